"""Every checkpoint resumes at the question after its last, whoever wrote it and when."""

from __future__ import annotations

import logging
import signal
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning.data import ArithmeticChain
from rpo_lightning.rewards import UniformRandomReward
from tests.conftest import make_data, make_module, make_trainer

STEPS_PER_EPOCH = 4


class Questions(Callback):
    """Notes which questions a run trains on, batch by batch."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop_after = stop_after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append([request.prompt.uid for request in batch])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.batches) == self.stop_after:
            trainer.should_stop = True


def run(folder, checkpoint=None, stop_after=None, callbacks=(), train=None, batch_size=2, **settings):
    """Train on eight questions, two an update; returns what the run was given, and its trainer."""
    questions = Questions(stop_after)
    trainer = make_trainer(folder, callbacks=[questions, *callbacks], **{"max_steps": -1, **settings})
    module = make_module(rewards=[UniformRandomReward()], group_size=2, max_response_tokens=4)
    data = make_data(train=train or ArithmeticChain(size=8, seed=1), batch_size=batch_size)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return questions.batches, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    # A fixture of the module begins before the one that fixes the seed of each test.
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        batches, _ = run(tmp_path_factory.mktemp("whole"), max_steps=11)
    assert len(batches) == 11
    assert all(a != b for a, b in pairwise(batches))
    return batches


@pytest.mark.parametrize("by", ["max_steps", "should_stop"])
@pytest.mark.parametrize("written", ["at the end of the epoch", "after fit", "after each update"])
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 10])
def test_a_checkpoint_goes_on_with_the_next_question(tmp_path, whole, stop, written, by):
    every = {"every_n_train_steps": 1} if written == "after each update" else {}
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True, **every)
    limit = {"max_steps": stop} if by == "max_steps" else {"stop_after": stop}
    first, trainer = run(tmp_path / "first", callbacks=[saving], **limit)
    path = saving.last_model_path
    if written == "after fit":
        path = str(tmp_path / "after.ckpt")
        trainer.save_checkpoint(path)
    rest, resumed = run(tmp_path / "rest", checkpoint=path, max_steps=11)
    assert first + rest == whole
    assert resumed.current_epoch == 11 // STEPS_PER_EPOCH + 1  # Lightning counts the epoch that max_steps ends


def test_a_run_that_is_stopped_again_and_again_trains_on_the_same_questions(tmp_path, whole):
    batches, checkpoint = [], None
    for stop in (2, 4, 5, 9, 11):
        more, trainer = run(tmp_path / str(stop), checkpoint=checkpoint, max_steps=stop)
        checkpoint = str(tmp_path / f"{stop}.ckpt")
        trainer.save_checkpoint(checkpoint)
        batches += more
    assert batches == whole


@pytest.mark.parametrize("written", ["at the end of the epoch", "after fit"])
def test_runs_limited_by_epochs_go_on_with_the_next_epoch(tmp_path, whole, written):
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    first, trainer = run(tmp_path / "first", callbacks=[saving], max_epochs=1)
    path = saving.last_model_path
    if written == "after fit":
        path = str(tmp_path / "after.ckpt")
        trainer.save_checkpoint(path)
    rest, _ = run(tmp_path / "rest", checkpoint=path, max_epochs=2)
    assert first + rest == whole[: 2 * STEPS_PER_EPOCH]


def test_validation_does_not_move_the_questions(tmp_path, whole):
    settings = {"limit_val_batches": 1, "val_check_interval": 2}
    for stop in (2, 3, 4):
        saving = ModelCheckpoint(tmp_path / f"saved{stop}", save_last=True)
        run(tmp_path / f"first{stop}", callbacks=[saving], max_steps=stop, **settings)
        done = torch.load(saving.last_model_path, weights_only=True)["global_step"]  # saved by the last validation
        rest, _ = run(tmp_path / f"rest{stop}", checkpoint=saving.last_model_path, max_steps=11, **settings)
        assert rest == whole[done:]


def test_a_signal_that_ends_a_run_within_an_epoch_loses_no_question(tmp_path, whole):
    class Terminate(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", callbacks=[saving, Terminate()], max_steps=11)
    rest, _ = run(tmp_path / "rest", checkpoint=saving.best_model_path, max_steps=11)
    assert rest == whole[2:]


def rows(size):
    return list(ArithmeticChain(size=size, seed=1).rows())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (rows(7), "the checkpoint's run had 8 training questions, there are 7 now"),
        (rows(9), "the checkpoint's run had 8 training questions, there are 9 now"),
        (rows(8)[::-1], "the 8 training questions come in another order"),
        (rows(9)[1:], "some of the 8 training questions are not those"),
    ],
)
def test_questions_that_have_changed_are_told_with_numbers(tmp_path, caplog, changed, told):
    caplog.set_level(logging.WARNING)
    _, trainer = run(tmp_path / "first", max_steps=3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    assert "training questions" not in caplog.text
    run(tmp_path / "same", checkpoint=str(tmp_path / "3.ckpt"), max_steps=4)
    assert "training questions" not in caplog.text
    run(tmp_path / "changed", checkpoint=str(tmp_path / "3.ckpt"), max_steps=4, train=changed)
    assert told in caplog.text
    assert "this epoch goes on after 6 questions" in caplog.text


@pytest.mark.parametrize(("every", "told"), [(2, None), (4, None), (3, "saves after every 6 updates"), (1, "every 2")])
def test_checkpoints_that_several_updates_a_rollout_make_rare_are_told(tmp_path, caplog, every, told):
    caplog.set_level(logging.WARNING)
    module = make_module(rewards=[UniformRandomReward()], minibatches_per_pass=2, max_response_tokens=4)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=every, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path, max_steps=6, callbacks=[saving]).fit(module, datamodule=make_data())
    written = sorted(path.stem for path in (tmp_path / "saved").iterdir())
    assert written == [f"step={step}" for step in (2, 4, 6) if step % every == 0]
    assert (told or "Use a multiple of") in caplog.text if told else "Use a multiple of" not in caplog.text
