"""Two ranks with vLLM: an engine each, or one engine over both. The same two processes run all cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollout.vllm_rank import CASES

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder with what two ranks have written for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.rollout.vllm_rank", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("tensor_parallel_size", "policy"), CASES)
def test_ranks_are_in_sync_and_sample_differently(ranks, tensor_parallel_size, policy):
    first, second = (
        json.loads((ranks / f"{tensor_parallel_size}-{policy}-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert [len(first["tokens"]), len(second["tokens"])] == [2, 3 if policy == "whole" else 2]
    assert first["tokens"] != second["tokens"][:2]
    assert max(first["largest"], second["largest"]) < 1e-4
