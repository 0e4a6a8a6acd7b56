"""One process, two with DDP and two with FSDP2 train the same policy from the same rollouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.policy.parallel.update_rank import CASES, FAULTS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]


def run(strategy: str, processes: int, folder: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "tests.policy.parallel.update_rank", strategy, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    run("single", 1, folder)
    assert_rows_were_shared("single", 1, folder)
    return torch.load(folder / "single.pt")


def assert_rows_were_shared(strategy: str, processes: int, folder: Path) -> None:
    """Check that rows were shared on every rank, in every case."""
    for rank in range(processes):
        members = torch.load(folder / f"{strategy}-members-{rank}.pt")
        assert list(members) == list(CASES)
        assert min(members.values()) > 1, members


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_update_of_one_and_never_hang(tmp_path, one_process, strategy):
    run(strategy, 2, tmp_path)
    assert_rows_were_shared(strategy, 2, tmp_path)
    found = torch.load(tmp_path / f"{strategy}.pt")
    assert list(found) == [*CASES, *FAULTS]
    for case, parameters in found.items():
        assert parameters.keys() == one_process[case].keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, one_process[case][name], atol=1e-6, rtol=0, msg=f"{case}: {name}")
    first, second = (torch.load(tmp_path / f"{strategy}-dropped-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
