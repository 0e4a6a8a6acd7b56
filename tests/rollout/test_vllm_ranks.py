"""Two ranks with vLLM: an engine each, or one engine over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("tensor_parallel_size", "policy"), [(1, "whole"), (1, "sharded"), (2, "whole"), (2, "adapted")]
)
def test_ranks_are_in_sync_and_sample_differently(tmp_path, tensor_parallel_size, policy):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).parent / "vllm_rank.py"), str(tensor_parallel_size), policy,
        str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [len(first["tokens"]), len(second["tokens"])] == [2, 3 if policy == "whole" else 2]
    assert first["tokens"] != second["tokens"][:2]
    assert max(first["largest"], second["largest"]) < 1e-4
