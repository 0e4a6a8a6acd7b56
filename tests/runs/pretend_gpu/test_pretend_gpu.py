"""The GPU path on a CPU build of torch: the files of claims run in a process of their own, because they change torch.

``claims_update.py``: six architectures, kernels, waits, planted faults, memory. ``claims_run.py``: ``Trainer.fit``.
``claims_flash.py``: other implementations of flash attention.
To see one claim: ``RPO_PRETEND_GPU=1 python -m pytest tests/runs/pretend_gpu/claims_update.py -k NAME``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.pretend_gpu import guard

pytestmark = pytest.mark.long

CLAIMS = sorted(Path(__file__).parent.glob("claims_*.py"))


@pytest.mark.skipif(guard.obstacle() is not None, reason=str(guard.obstacle()))
def test_claims_hold_on_the_pretend_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *CLAIMS]
    done = subprocess.run(
        command, env={**os.environ, "RPO_PRETEND_GPU": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout
