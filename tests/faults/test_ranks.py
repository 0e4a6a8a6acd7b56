"""A rank that is killed or fails ends the other within a minute, with its cause, and both resume exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kill import Fault
from tests.faults.matrix import kill_and_resume, tail
from tests.faults.runs import TWO_RANKS, arguments

ENGINE = "rpo_lightning.rollout.transformers.engine:TransformersEngine"
# A call of each phase that both ranks make.
PHASES = {
    "filling": Fault(f"{ENGINE}.generate", 2),
    "sampling": Fault(f"{ENGINE}.generate", 4),
    "grading": Fault("rpo_lightning.rewards.grading:Grading.finish", 4),
    "training": Fault("torch.optim:AdamW.step", 4),
    "checkpoint": Fault("rpo_lightning.module:gathered_state", 3),
}
SECONDS = 60


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_ends_the_other_and_both_resume_exactly(
    runs, micro_policy, whole_of_two, tmp_path, outcomes, phase, rank
):
    fault = PHASES[phase]._replace(rank=rank)
    wrong = kill_and_resume(runs, tmp_path, micro_policy, whole_of_two, [fault], TWO_RANKS, ranks=2)
    outcomes.add(wrong, ranks=2, engine="transformers", phase=phase, point=f"rank {rank}", call=fault.target)
    assert wrong is None
    other = tmp_path / ("output-1.txt" if rank == 0 else "output.txt")
    assert f"rank {rank} has ended (it was killed), so rank {1 - rank} ends too" in other.read_text()


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_fails_ends_the_other_with_its_cause(runs, micro_policy, tmp_path, phase):
    command = arguments(tmp_path, micro_policy, TWO_RANKS)
    codes = runs.run(tmp_path, command, PHASES[phase]._replace(rank=1, does="fail"), ranks=2)
    assert all(codes), tail(tmp_path)
    assert runs.seconds_apart < SECONDS
    assert "rank 1 has ended (RuntimeError: this is the cause), so rank 0 ends too" in output(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("does", ["SIGKILL", "fail"])
def test_a_rank_that_is_in_no_collective_notices_too(runs, micro_policy, tmp_path, does):
    command = arguments(tmp_path, micro_policy, TWO_RANKS)
    ends, computes = PHASES["sampling"]._replace(rank=1, does=does), PHASES["sampling"]._replace(does="compute 300")
    codes = runs.run(tmp_path, command, ends, computes, ranks=2)
    assert all(codes)
    assert runs.seconds_apart < SECONDS
    assert "so rank 0 ends too" in output(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_both_in_order(runs, micro_policy, whole_of_two, tmp_path, rank):
    fault = PHASES["training"]._replace(rank=rank, does="SIGTERM")
    command = arguments(tmp_path, micro_policy, TWO_RANKS)
    assert runs.run(tmp_path, command, fault, ranks=2)[0] == 143, tail(tmp_path)
    assert output(tmp_path).count("go on with the same command and --ckpt_path last") == 1
    assert "Traceback" not in output(tmp_path)


def output(folder: Path) -> str:
    """What rank 0 has printed."""
    return (folder / "output.txt").read_text()
