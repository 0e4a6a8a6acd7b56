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
STRATEGIES = ("ddp", "fsdp2")


def run(launcher: list[str], folder: Path, *strategies: str) -> Path:
    command = [sys.executable, *launcher, "-m", "tests.policy.parallel.update_rank", str(folder), *strategies]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = run([], tmp_path_factory.mktemp("single"), "single")
    assert_rows_were_shared("single", 1, folder)
    return torch.load(folder / "single.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder with what the same two processes have written with each strategy."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run(launcher, tmp_path_factory.mktemp("two"), *STRATEGIES)


def assert_rows_were_shared(strategy: str, processes: int, folder: Path) -> None:
    """Check that rows were shared on every rank, in every case."""
    for rank in range(processes):
        members = torch.load(folder / f"{strategy}-members-{rank}.pt")
        assert list(members) == list(CASES)
        assert min(members.values()) > 1, members


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_make_the_update_of_one_and_never_hang(one_process, two_processes, strategy):
    assert_rows_were_shared(strategy, 2, two_processes)
    found = torch.load(two_processes / f"{strategy}.pt")
    assert list(found) == [*CASES, *FAULTS]
    for case, parameters in found.items():
        assert parameters.keys() == one_process[case].keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, one_process[case][name], atol=1e-6, rtol=0, msg=f"{case}: {name}")
    first, second = (torch.load(two_processes / f"{strategy}-dropped-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
