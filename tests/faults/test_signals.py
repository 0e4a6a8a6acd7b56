"""A run that a signal ends finishes its update, writes a checkpoint, says how to go on, and does so exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.compare import difference
from tests.faults.kill import Fault
from tests.faults.matrix import kill_and_resume, tail
from tests.faults.runs import arguments

GO_ON = "go on with the same command and --ckpt_path last"
BACKWARD = "rpo_lightning.update.loss:PolicyLoss.backward"
SIGNALLED = {
    "SIGTERM in an update": Fault(BACKWARD, 3, does="SIGTERM"),
    "Ctrl-C while grading processes work": Fault(
        "rpo_lightning.rewards.pool:GradingPool.collect", 5, does="press_ctrl_c"
    ),
}
SIGNALLED_ELSEWHERE = {
    "SIGUSR1 while a cache is filled": Fault("rpo_lightning.rewards.grading:Grading.finish", 2, does="SIGUSR1"),
    "SIGTERM in a validation": Fault("rpo_lightning.module:RPOModule.validation_step", 1, does="SIGTERM"),
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


@pytest.mark.slow
def test_slurm_requeues_a_job_that_it_has_warned_and_the_same_command_goes_on(runs, micro_policy, whole, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "rpo", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "PATH": f"{scontrol.parent}:/usr/bin:/bin",
    }  # fmt: skip
    command = [*arguments(tmp_path, micro_policy), f"--trainer.default_root_dir={tmp_path}"]
    assert runs.run(tmp_path, command, Fault(BACKWARD, 3, does="SIGUSR1"), environment=slurm) == [138], tail(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    again = {**slurm, "SLURM_RESTART_COUNT": "1"}
    assert runs.run(tmp_path, command, environment=again) == [0], tail(tmp_path)
    assert difference(whole, tmp_path) is None
    assert len(Path(tmp_path / "iterations-0.jsonl").read_text().splitlines()) == 4
