"""A run whose disk is full, read-only or gone says so once for each file, keeps what is there, and can be resumed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.compare import difference
from tests.faults.kill import Fault
from tests.faults.matrix import tail
from tests.faults.runs import Runs, arguments

STEP = "rpo_lightning.module:RPOModule.training_step"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder with a file system of its own, of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def command_on(disk: Path, notes: Path, policy: Path) -> list[str]:
    """A run that writes to the disk, and its records elsewhere."""
    command = arguments(notes, policy)
    return [part.replace(str(notes / "runs"), str(disk / "runs")) for part in command]


def the_line(folder: Path, what: str) -> str:
    """The only line of the output with these words."""
    (line,) = [line for line in (folder / "output.txt").read_text().splitlines() if what in line]
    return line


def finish(runs: Runs, notes: Path, disk: Path, policy: Path, whole: Path) -> None:
    """Resume the run, and compare it with the whole one."""
    assert runs.run(notes, [*command_on(disk, notes, policy), "--ckpt_path=last"]) == [0], tail(notes)
    (notes / "runs").symlink_to(disk / "runs")
    assert difference(whole, notes) is None


def test_a_run_on_a_full_disk_keeps_what_it_has_and_is_resumed_when_there_is_room(
    runs, micro_policy, whole, tmp_path, small_disk
):
    full = Fault(STEP, 3, does=f"fill {small_disk}")
    assert runs.run(tmp_path, command_on(small_disk, tmp_path, micro_policy), full) == [2]
    assert "No space left on device" in the_line(tmp_path, "error:")
    assert "--ckpt_path last then writes it" in the_line(tmp_path, "error:")
    assert "The run goes on" in the_line(tmp_path, "step=6.ckpt: this checkpoint could not be written")
    for file in ("policy-step=8", "policy", "cache.parquet", "summary.json"):  # the page of metrics.csv has room
        assert the_line(tmp_path, f"{file}: could not be written (No space left on device). The run goes on")
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    (run,) = small_disk.glob("runs/x/*")
    assert sorted(path.name for path in run.glob("checkpoints/*")) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert pq.read_table(run / "cache.parquet").num_rows == 7  # filled before
    assert not [*run.rglob("*.partial")]
    (small_disk / "filling").unlink()
    finish(runs, tmp_path, small_disk, micro_policy, whole)


@pytest.mark.slow
def test_a_run_goes_on_through_a_disk_that_is_full_for_a_while(runs, micro_policy, whole, tmp_path, small_disk):
    full, again = Fault(STEP, 2, does=f"fill {small_disk}"), Fault(STEP, 4, does=f"make_room {small_disk}")
    assert runs.run(tmp_path, command_on(small_disk, tmp_path, micro_policy), full, again) == [0], tail(tmp_path)
    said = (tmp_path / "output.txt").read_text()
    assert said.count("this checkpoint could not be written") == 1
    assert "checkpoints can be written again" in said
    assert "metrics.csv: could be written again" in said
    (tmp_path / "runs").symlink_to(small_disk / "runs")
    assert difference(whole, tmp_path) is None
    (run,) = small_disk.glob("runs/x/*")
    assert sorted(path.name for path in run.glob("checkpoints/*")) == ["epoch=1-step=8.ckpt", "last.ckpt"]


def test_a_run_whose_folder_becomes_read_only_is_resumed_when_it_can_be_written(
    runs, micro_policy, whole, tmp_path, small_disk
):
    frozen = Fault(STEP, 3, does=f"mount_again {small_disk} ro")
    assert runs.run(tmp_path, command_on(small_disk, tmp_path, micro_policy), frozen) == [2], tail(tmp_path)
    assert "Read-only file system" in the_line(tmp_path, "error:")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    finish(runs, tmp_path, small_disk, micro_policy, whole)


@pytest.mark.slow
def test_a_run_whose_folder_is_removed_makes_it_again(runs, micro_policy, whole, tmp_path):
    gone = Fault(STEP, 3, does=f"remove {tmp_path}/runs")
    assert runs.run(tmp_path, arguments(tmp_path, micro_policy), gone) == [0], tail(tmp_path)
    (run,) = (tmp_path / "runs" / "x").iterdir()
    left = {path.name for path in run.iterdir()}
    assert {"policy", "cache.parquet", "metrics.csv", "checkpoints", "summary.json"} <= left


def test_checkpoints_that_are_too_large_for_the_disk_end_nothing(runs, micro_policy, whole, tmp_path):
    """The same without a file system of its own: no file may grow beyond a limit."""
    limit = Fault(STEP, 2, does="limit_files 30000")
    none = Fault("tests.faults.final_state:FinalState.on_fit_end", does="limit_files 0")  # it writes a large file too
    assert runs.run(tmp_path, arguments(tmp_path, micro_policy), limit, none) == [0], tail(tmp_path)
    assert difference(whole, tmp_path) is None
    assert "File too large" in the_line(tmp_path, "this checkpoint could not be written")
    (run,) = (tmp_path / "runs" / "x").iterdir()
    assert sorted(path.name for path in run.glob("checkpoints/*")) == ["epoch=0-step=2.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_saved_while_it_is_filled_is_filled(runs, micro_policy, whole, tmp_path, small_disk):
    full = Fault("rpo_lightning.callbacks.cache_filling:CacheFilling._round", 2, does=f"fill {small_disk}")
    again = Fault(STEP, 1, does=f"make_room {small_disk}")
    assert runs.run(tmp_path, command_on(small_disk, tmp_path, micro_policy), full, again) == [0], tail(tmp_path)
    assert "every checkpoint holds the cache too" in the_line(tmp_path, "cache.parquet: could not be written")
    (tmp_path / "runs").symlink_to(small_disk / "runs")
    assert difference(whole, tmp_path) is None


@pytest.mark.slow
def test_a_summary_alone_that_cannot_be_written_ends_the_run_with_its_line(
    runs, micro_policy, whole, tmp_path, small_disk
):
    full = Fault("rpo_lightning.callbacks.run_summary:RunSummaryCallback.on_fit_end", 1, does=f"fill {small_disk}")
    assert runs.run(tmp_path, command_on(small_disk, tmp_path, micro_policy), full) == [2], tail(tmp_path)
    assert "summary.json: could not be written" in the_line(tmp_path, "error:")
    (small_disk / "filling").unlink()
    finish(runs, tmp_path, small_disk, micro_policy, whole)
    assert (small_disk / "runs" / "x" / "version_1" / "summary.json").exists()
