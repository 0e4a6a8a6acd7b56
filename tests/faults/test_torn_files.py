"""Checkpoints and caches that are torn or corrupt are refused with the last good one, and ``last`` passes over them."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.callbacks import run_folder
from rpo_lightning.callbacks.run_folder import last_checkpoint
from rpo_lightning.cli import checkpoints
from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import CacheError, CheckpointError
from rpo_lightning.core.files import Unwritten, append, replacing
from rpo_lightning.policy.parallel.checkpoint_files import WholeCheckpointIO, write_folders_whole
from tests.conftest import make_data, make_module, make_trainer
from tests.faults.bad_inputs.case import RUN, RUN_FILE
from tests.faults.compare import difference
from tests.faults.kill import Fault
from tests.faults.runs import arguments


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "torn": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "with another bit": lambda data: flip(data, len(data) // 2),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two checkpoints of a policy."""
    folder = tmp_path_factory.mktemp("saved")
    counts = {"total": {}, "current": {}}
    loops = {"fit_loop": {"epoch_progress": counts, "epoch_loop.batch_progress": counts}}
    for number in (1, 2):
        run = dict.fromkeys(("iteration", "seed", "guard", "buffers", "generators"))
        progress = {"epoch": 0, "global_step": number, "loops": loops, "callbacks": {}, "lr_schedulers": []}
        content = {"state_dict": {"weight": torch.arange(10_000.0) * number}, "rpo": run, **progress}
        content["optimizer_states"] = [{}]
        WholeCheckpointIO().save_checkpoint(content, folder / f"step={number}.ckpt")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_last_good_one(saved, tmp_path, caplog, damage):
    good, bad = (tmp_path / f"step={number}.ckpt" for number in (1, 2))
    good.write_bytes((saved / good.name).read_bytes())
    bad.write_bytes(DAMAGES[damage]((saved / bad.name).read_bytes()))
    os.utime(good, (60, 60))  # the damaged one is newer
    with pytest.raises(
        CheckpointError, match=rf"step=2\.ckpt: the checkpoint is damaged .*; the last good one is {good}"
    ):
        WholeCheckpointIO().load_checkpoint(bad)
    assert WholeCheckpointIO().load_checkpoint(good)["state_dict"]["weight"][1] == 1
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)])
    assert last_checkpoint(trainer) == good
    assert "step=2.ckpt is passed over: the checkpoint is damaged" in caplog.text


def test_last_passes_over_newer_weights_alone_where_training_is_to_go_on(saved, tmp_path, caplog):
    good, weights = tmp_path / "step=1.ckpt", tmp_path / "best.ckpt"
    good.write_bytes((saved / good.name).read_bytes())
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "rpo": {}, "epoch": 0, "global_step": 2}, weights)
    os.utime(good, (60, 60))
    trainer = make_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)])
    assert last_checkpoint(trainer) == good
    assert "best.ckpt is passed over" in caplog.text
    assert last_checkpoint(trainer, to_train=False) == weights


def test_a_run_refuses_a_damaged_checkpoint_in_a_line(saved, tmp_path):
    path = tmp_path / "step=2.ckpt"
    path.write_bytes(DAMAGES["with another bit"]((saved / path.name).read_bytes()))
    assert torch.load(path)["state_dict"]["weight"].shape == (10_000,)  # torch reads it without a word
    with pytest.raises(CheckpointError, match=r"the checksum of its part .* is wrong\); no whole one is beside it"):
        make_trainer(tmp_path / "run").fit(make_module(), datamodule=make_data(), ckpt_path=path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused_with_the_last_good_one(tmp_path, damage):
    cache = ExperienceCache("tokenizer")
    for number in range(50):
        ids = np.random.default_rng(number).integers(0, 30_000, 90)
        cache.remember(f"question {number}", CachedResponse(ids, 1.0, True, True, ((0, 90),)))
    good, bad = (tmp_path / f"version_{number}" / "cache.parquet" for number in (0, 1))
    for path in (good, bad):
        write_cache(cache, path)
    bad.write_bytes(DAMAGES[damage](good.read_bytes()))
    with pytest.raises(
        CacheError, match=rf"version_1/cache\.parquet: not a readable Parquet file .*: the last good one is {good}"
    ):
        read_cache(bad, "tokenizer")
    assert len(read_cache(good, "tokenizer")) == 50


def _another_bit(path: Path) -> None:
    path.write_bytes(DAMAGES["with another bit"](path.read_bytes()))


def _a_token_that_there_is_not(path: Path) -> None:
    table = pq.read_table(path)
    ids = [None if row is None else [48, *row[1:]] for row in table["token_ids"].to_pylist()]
    at = table.schema.get_field_index("token_ids")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(ids, table.schema.field(at).type)), path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_another_bit, "it is passed over"),
        pytest.param(_a_token_that_there_is_not, "This run fills its cache anew", marks=pytest.mark.slow),
    ],
)
def test_last_passes_over_a_damaged_cache_that_was_being_filled(runs, micro_policy, whole, tmp_path, damage, told):
    killed = Fault("rpo_lightning.rewards.grading:Grading.finish", 3)
    command = arguments(tmp_path, micro_policy)
    assert runs.run(tmp_path, command, killed) == [-9]
    (file,) = tmp_path.glob("runs/x/*/cache.parquet")
    damage(file)
    assert runs.run(tmp_path, [*command, "--ckpt_path=last"]) == [0], (tmp_path / "output.txt").read_text()[-1500:]
    (line,) = [line for line in (tmp_path / "output.txt").read_text().splitlines() if told in line]
    assert str(file) in line
    assert difference(whole, tmp_path) is None


def test_last_reads_the_checkpoint_that_it_takes_once_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(RUN_FILE).write_text(RUN)
    main(["fit", "--config", RUN_FILE])
    looks = []
    for holder, name in ((zipfile.ZipFile, "testzip"), (run_folder, CHECK), (checkpoints, CHECK)):
        monkeypatch.setattr(holder, name, _noting(looks, name, getattr(holder, name)))
    main(["fit", "--config", RUN_FILE, "--ckpt_path", "last", "--trainer.max_steps", "2"])
    assert sorted(looks) == [CHECK, "testzip"]


CHECK = "require_checkpoint"


def _noting(looks, name, function):
    def noted(*args, **settings):
        looks.append(name)
        return function(*args, **settings)

    return noted


class Stopped(BaseException):
    """Something that ends a block."""


def test_a_file_whose_writing_ends_early_stays_as_it_was_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise Stopped

    with pytest.raises(Stopped):
        write()
    assert path.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_appended_as_a_whole_is_not_appended(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append(path, "one\n")
    real = Path.open

    def opens_on_a_full_disk(self, *args, **settings):
        file = real(self, *args, **settings)
        write, room = file.write, [3]

        class Full:
            seek, truncate = file.seek, file.truncate
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: file.close()  # noqa: E731

            def write(self, data):
                if not room[0]:
                    raise OSError(28, "No space left on device")
                taken, room[0] = write(data[: room[0]]), 0
                return taken

        return Full()

    monkeypatch.setattr(Path, "open", opens_on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        append(path, "second\n")
    monkeypatch.undo()
    assert path.read_text() == "one\n"


def test_what_cannot_be_written_is_told_once_until_it_can_be(caplog):
    caplog.set_level(logging.INFO)
    unwritten, path = Unwritten(), Path("metrics.csv")
    for is_full in (True, True, False, False, True):
        with unwritten.goes_on(path, "rows are kept"):
            if is_full:
                raise OSError(28, "No space left on device")
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.csv: could not be written (No space left on device). The run goes on; rows are kept",
        "metrics.csv: could be written again",
        "metrics.csv: could not be written (No space left on device). The run goes on; rows are kept",
    ]
    assert unwritten.causes == {path: "No space left on device"}


class FolderStrategy:
    """Writes a checkpoint as a folder, file by file."""

    is_global_zero = True
    fails = False

    def broadcast(self, path):
        return path

    def barrier(self):
        pass

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path.mkdir()
        (path / "shard").write_text(checkpoint)
        if self.fails:
            raise Stopped
        (path / "meta.pt").write_text("last")


def test_a_checkpoint_that_is_a_folder_replaces_the_earlier_one_when_it_is_whole(tmp_path):
    strategy, path = FolderStrategy(), tmp_path / "last.ckpt"
    write_folders_whole(strategy)
    strategy.save_checkpoint("first", path)
    strategy.save_checkpoint("second", path)
    strategy.fails = True
    with pytest.raises(Stopped):
        strategy.save_checkpoint("third", path)
    assert (path / "shard").read_text() == "second"
    strategy.fails = False
    strategy.save_checkpoint("fourth", path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert (path / "shard").read_text() == "fourth"
