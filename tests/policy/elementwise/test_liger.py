"""Liger's kernels against the plain layers, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def test_ligers_kernels_compute_what_the_plain_layers_do():
    """In a process of its own: Triton decides when it is imported whether kernels are interpreted."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel (extra: liger)")
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("claims_in_interpreter.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
