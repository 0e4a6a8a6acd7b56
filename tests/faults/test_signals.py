"""A run that a signal ends finishes its update, writes a checkpoint, says how to go on, and does so exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from rpo_lightning.cache.parquet import whole_filling_of
from rpo_lightning.policy.parallel.checkpoint_files import damage_of
from tests.faults.compare import difference
from tests.faults.kill import Fault
from tests.faults.matrix import kill_and_resume, tail
from tests.faults.runs import arguments

GO_ON = "go on with the same command and --ckpt_path last"
BACKWARD = "rpo_lightning.update.loss:PolicyLoss.backward"
STEP = "rpo_lightning.module:RPOModule.training_step"
VALIDATE = "rpo_lightning.module:RPOModule.validation_step"
GRADING = "rpo_lightning.rewards.grading:Grading"
CONSTANT_REWARD = f"--model.rewards={json.dumps([{'class_path': 'AccuracyReward'}])}"  # nothing is ever right
SIGNALLED = {
    "SIGTERM in an update": Fault(BACKWARD, 3, does="SIGTERM"),
    "Ctrl-C while grading processes work": Fault(
        "rpo_lightning.rewards.pool:GradingPool.collect", 5, does="press_ctrl_c"
    ),
}
SIGNALLED_ELSEWHERE = {
    "SIGUSR1 while a cache is filled": Fault(f"{GRADING}.finish", 2, does="SIGUSR1"),
    "SIGTERM in a validation": Fault(VALIDATE, 1, does="SIGTERM"),
}


def ends_in_order_and_goes_on_exactly(runs, folder: Path, policy: Path, whole: Path, fault: Fault) -> None:
    assert kill_and_resume(runs, folder, policy, whole, [fault], ["--export.every_n_steps=null"]) is None
    said = (folder / "output.txt").read_text()
    assert said.count(GO_ON) == 1
    assert "the run ends after this update" in said
    assert "Traceback" not in said
    # An update that was begun is not made again.
    assert len((folder / "iterations-0.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", SIGNALLED)
def test_a_run_that_is_signalled_ends_in_order_and_goes_on_exactly(runs, micro_policy, whole, tmp_path, name):
    ends_in_order_and_goes_on_exactly(runs, tmp_path, micro_policy, whole, SIGNALLED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALLED_ELSEWHERE)
def test_so_does_one_that_is_signalled_outside_of_updates(runs, micro_policy, whole, tmp_path, name):
    ends_in_order_and_goes_on_exactly(runs, tmp_path, micro_policy, whole, SIGNALLED_ELSEWHERE[name])


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(runs, micro_policy, whole, tmp_path):
    fault = Fault(BACKWARD, 3, does="press_ctrl_c 2")
    assert kill_and_resume(runs, tmp_path, micro_policy, whole, [fault]) is None
    said = (tmp_path / "output.txt").read_text()
    assert "another Ctrl-C ends it at once" in said
    assert GO_ON not in said


ENDED = "the run ended after update"


def last_line(folder: Path) -> str:
    """The line with which a run that was signalled ends."""
    (line,) = [line for line in (folder / "output.txt").read_text().splitlines() if ENDED in line]
    return line


def named(line: str) -> Path | None:
    """The file that a line names, if any."""
    found = re.search(r"(/\S+?\.(ckpt|parquet))[);,]", line)
    return None if found is None else Path(found[1])


NO_CHECKPOINTS = ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]", "--trainer.num_sanity_val_steps=0"]
NO_ROOM = Fault(STEP, 1, does="limit_files 30000")
# What is signalled, what happens before, further settings; then what the last line says, and whether one can go on.
LAST_LINES: dict[str, tuple[list[Fault], list[str], str, bool]] = {
    "after an update": ([Fault(STEP, 2, does="SIGTERM")], [], "(checkpoint /", True),
    "after an iteration without an update": (
        [Fault(STEP, 1, does="SIGTERM")], ["--model.dynamic_sampling=DynamicSampling", CONSTANT_REWARD],
        "(checkpoint /", True,
    ),
    "on a full disk, before any checkpoint": (
        [NO_ROOM, Fault(STEP, 1, does="SIGTERM")], [],
        "(no checkpoint, since it could not be written: what was trained is lost): start the same command again", False,
    ),
    "on a full disk, after a checkpoint": (
        [Fault(STEP, 2, does="limit_files 30000"), Fault(STEP, 3, does="SIGTERM")], [],
        "(no checkpoint of it, since it could not be written; the last one is /", True,
    ),
    "without checkpoints": (
        [Fault(STEP, 2, does="SIGTERM")], NO_CHECKPOINTS,
        "(no checkpoint, since there is no ModelCheckpoint in trainer.callbacks: what was trained is lost): start the "
        "same command again", False,
    ),
    "while the cache is filled": (
        [Fault(f"{GRADING}.finish", 2, does="SIGTERM")], [], "(nothing was trained yet; the cache so far is /", True,
    ),
    "in the sanity check": (
        [Fault(VALIDATE, 1, does="SIGTERM")], ["--trainer.num_sanity_val_steps=2"],
        "(nothing was trained yet): start the same command again", False,
    ),
}  # fmt: skip
_FAST = {"on a full disk, after a checkpoint", "without checkpoints"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in _FAST else pytest.mark.slow) for c in LAST_LINES])
def test_the_last_line_names_only_a_file_that_is_there_and_else_says_what_is_lost(runs, micro_policy, tmp_path, case):
    faults, settings, says, goes_on = LAST_LINES[case]
    assert runs.run(tmp_path, arguments(tmp_path, micro_policy, settings), *faults) == [143], tail(tmp_path)
    line = last_line(tmp_path)
    assert says in line
    assert (GO_ON in line) == goes_on
    file = named(line)
    assert (file is not None) == goes_on
    if file is not None and file.suffix == ".ckpt":
        assert damage_of(file) is None
    elif file is not None:
        assert whole_filling_of(file) is not None
    assert "Traceback" not in (tmp_path / "output.txt").read_text()


def on_slurm(folder: Path, code: int = 0) -> dict[str, str]:
    """The variables of a job, whose ``scontrol`` writes down what it is asked for and ends with a code."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {folder}/requeued\nexit {code}\n")
    scontrol.chmod(0o755)
    return {
        "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "rpo", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "PATH": f"{scontrol.parent}:/usr/bin:/bin",
    }  # fmt: skip


def slurm_arguments(folder: Path, policy: Path, settings: Sequence[str] = ()) -> list[str]:
    return [*arguments(folder, policy, settings), f"--trainer.default_root_dir={folder}"]


REQUEUED = {
    "in an update": (Fault(BACKWARD, 3, does="SIGUSR1"), [], "checkpoint"),
    "while a cache is filled": (Fault(f"{GRADING}.finish", 2, does="SIGUSR1"), [], "checkpoint"),
    "in the sanity check": (
        Fault(VALIDATE, 1, does="SIGUSR1"), ["--trainer.num_sanity_val_steps=2"], "nothing was trained yet",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "where", ["in an update", "while a cache is filled", pytest.param("in the sanity check", marks=pytest.mark.slow)]
)
def test_slurm_requeues_a_job_that_it_has_warned_and_the_same_command_goes_on(
    runs, micro_policy, whole, tmp_path, where
):
    fault, settings, kept = REQUEUED[where]
    command, slurm = slurm_arguments(tmp_path, micro_policy, settings), on_slurm(tmp_path)
    assert runs.run(tmp_path, command, fault, environment=slurm) == [138], tail(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "SLURM starts job 7 again" in last_line(tmp_path)
    assert kept in last_line(tmp_path)
    again = {**slurm, "SLURM_RESTART_COUNT": "1"}
    assert runs.run(tmp_path, command, environment=again) == [0], tail(tmp_path)
    if settings:  # its generators are where the sanity check of the first run would have left them
        return
    assert difference(whole, tmp_path) is None
    assert len((tmp_path / "iterations-0.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_slurms_checkpoint_of_a_filling_goes_on_exactly_without_the_file_too(runs, micro_policy, whole, tmp_path):
    command, slurm = slurm_arguments(tmp_path, micro_policy), on_slurm(tmp_path)
    assert runs.run(tmp_path, command, REQUEUED["while a cache is filled"][0], environment=slurm) == [138]
    (file,) = tmp_path.glob("runs/x/*/cache.parquet")
    file.unlink()
    again = {**slurm, "SLURM_RESTART_COUNT": "1"}
    assert runs.run(tmp_path, command, environment=again) == [0], tail(tmp_path)
    assert "hpc_ckpt_1.ckpt" in (tmp_path / "output.txt").read_text()
    assert difference(whole, tmp_path) is None


@pytest.mark.slow
def test_a_job_that_slurm_does_not_requeue_is_told_how_to_go_on(runs, micro_policy, tmp_path):
    slurm = on_slurm(tmp_path, code=1)
    fault = REQUEUED["in an update"][0]
    assert runs.run(tmp_path, slurm_arguments(tmp_path, micro_policy), fault, environment=slurm) == [138]
    assert "scontrol requeue 7: failed with code 1" in (tmp_path / "output.txt").read_text()
    assert GO_ON in last_line(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ckpt_path", [[], ["--ckpt_path=last"]])
def test_a_job_goes_on_from_a_filling_that_is_newer_than_slurms_checkpoint(
    runs, micro_policy, whole, tmp_path, ckpt_path
):
    """The older checkpoint is of another run in the same folder."""
    command, slurm = slurm_arguments(tmp_path, micro_policy), on_slurm(tmp_path)
    earlier = tmp_path / "earlier"
    other = [*arguments(earlier, micro_policy), f"--trainer.default_root_dir={tmp_path}"]
    assert runs.run(earlier, other, Fault(BACKWARD, 3, does="SIGUSR1"), environment=slurm) == [138], tail(earlier)
    killed = Fault(f"{GRADING}.finish", 3, does="SIGKILL")
    assert runs.run(tmp_path, command, killed) == [-9], tail(tmp_path)
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    again = {**slurm, "SLURM_RESTART_COUNT": "1"}
    assert runs.run(tmp_path, [*command, *ckpt_path], environment=again) == [0], tail(tmp_path)
    said = (tmp_path / "output.txt").read_text()
    assert "cache.parquet, a cache that was being filled" in said
    assert "Restoring states from the checkpoint" not in said
    assert difference(whole, tmp_path) is None
