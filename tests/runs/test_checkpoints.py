"""What a checkpoint is used for besides resuming, and runs that share objects with earlier ones."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rpo_lightning import ExperienceCacheCallback, RPOModule
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import UniformCut
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.callbacks import HuggingFaceExportCallback, LoneExceptionCallback, RunSummaryCallback
from rpo_lightning.core.errors import CacheError, ConfigurationError, DataError
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.policy.export import save_policy
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rewards import Reward, UniformRandomReward
from rpo_lightning.update.dynamic_sampling import DynamicSampling, GroupBuffer
from rpo_lightning.update.schedule import LearningRateSchedule
from tests.conftest import REASONER, cache_contents, make_data, make_module, make_trainer


def rpo_cache() -> ExperienceCacheCallback:
    return ExperienceCacheCallback(cut=UniformCut(60), initialisation="lazy", keep_unfinished=True)


def final_run(folder: Path, resume: Path | None = None) -> tuple[RPOModule, ExperienceCacheCallback]:
    """Two updates with everything that a run leaves; the loggers have folders of their own."""
    cache, module = rpo_cache(), make_module(rewards=[UniformRandomReward()], max_response_tokens=32)
    trainer = make_trainer(
        folder,
        max_steps=2,
        logger=[TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="table")],
        callbacks=[cache, HuggingFaceExportCallback(), RunSummaryCallback(), ModelCheckpoint(folder, "{step}")],
        num_sanity_val_steps=1,
        limit_val_batches=1,
    )
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume, weights_only=True if resume else None)
    return module, cache


def test_a_run_that_is_taken_up_with_nothing_left_to_train_leaves_policy_and_cache(tmp_path, capsys):
    def listed() -> dict[str, Path]:
        paths = [Path(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
        assert all(path.exists() for path in paths)
        return {path.name: path for path in paths}

    module, cache = final_run(tmp_path / "whole")
    assert set(listed()) == {"policy", "metrics.csv", "cache.parquet", "summary.json"}
    final_run(tmp_path / "again", resume=tmp_path / "whole" / "step=2.ckpt")
    left = listed()
    assert set(left) == {"policy", "cache.parquet", "summary.json"}
    exported = load_policy(str(left["policy"])).state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in module.policy.state_dict().items())
    saved = ExperienceCache(cache.cache.tokenizer_fingerprint)
    saved = read_cache(left["cache.parquet"], saved.tokenizer_fingerprint)
    assert cache_contents(saved) == cache_contents(cache.cache)


@pytest.fixture
def trained(tmp_path):
    """A short RPO run, its cache and its checkpoint."""
    cache = rpo_cache()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[cache, saver])
    trainer.fit(make_module(rewards=[UniformRandomReward()]), datamodule=make_data())
    return tmp_path / "step=2.ckpt", cache


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_of_an_rpo_run_is_evaluated_with_the_cache_callback_in_place(trained, tmp_path, stage):
    path, _ = trained
    saved = torch.load(path, weights_only=True)["state_dict"]
    module = make_module()
    trainer = make_trainer(tmp_path / stage, callbacks=[rpo_cache()], limit_val_batches=1)
    data = make_data(test=make_data().sources["val"])
    (metrics,) = getattr(trainer, stage)(module, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)
    assert 0 <= metrics[f"{'val' if stage == 'validate' else stage}/accuracy"] <= 1
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


def test_evaluating_an_older_checkpoint_leaves_the_cache_of_the_run_alone(trained, tmp_path):
    path, _ = trained
    cache, module = rpo_cache(), make_module(rewards=[UniformRandomReward()])
    trainer = make_trainer(tmp_path / "other", max_steps=4, callbacks=[cache])
    trainer.fit(module, datamodule=make_data(test=make_data().sources["val"]))
    before, iteration = cache_contents(cache.cache), module.iteration
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=path, weights_only=True, verbose=False)
    assert cache_contents(cache.cache) == before
    assert module.iteration == iteration == 4


def test_a_cache_that_is_used_again_keeps_its_responses_and_takes_the_limits_of_its_run(trained, tmp_path):
    _, cache = trained
    lengths = {e.uid: len(e.response) for e in cache.cache if e.response is not None}
    assert max(lengths.values()) > 40
    module = make_module(rewards=[UniformRandomReward()], max_response_tokens=40)
    make_trainer(tmp_path / "again", max_steps=1, callbacks=[cache]).fit(module, datamodule=make_data())
    assert {group.request.prompt.uid for group in module.groups} < set(lengths)
    assert all(group.request.prefix_ids and max(group.lengths) <= 40 for group in module.groups)
    assert pd.read_csv(tmp_path / "again" / "metrics.csv")["cache/age"].iloc[0] >= 0


def test_a_cache_that_is_used_again_is_not_saved_over_its_source_either(trained, tmp_path):
    source = tmp_path / "cache.parquet"
    _, cache = trained
    cache.path = str(source)
    before = source.read_bytes()
    cache.cache.forget_updates()
    with pytest.raises(ConfigurationError, match="where this run would save its own cache"):
        make_trainer(tmp_path, callbacks=[cache]).fit(make_module(), datamodule=make_data())
    assert source.read_bytes() == before


def test_a_cache_that_is_used_again_belongs_to_tokenizer_and_questions(trained, tmp_path):
    _, cache = trained
    other = make_module()
    other.tokenizer.add_tokens(["@"])
    rows = [{"question": f"{i}a+1=", "answer": str(i + 1)} for i in range(8)]
    for module, data, message in (
        (other, make_data(), "the cache of an earlier run: made with another tokenizer"),
        (make_module(), make_data(train=rows), "the cache of an earlier run: made for another data set"),
    ):
        with pytest.raises(CacheError, match=message):
            make_trainer(tmp_path / "again", callbacks=[cache]).fit(module, datamodule=data)


def test_a_data_module_serves_no_prefixes_of_an_earlier_run(tmp_path):
    data = make_data(batch_size=8)
    make_trainer(tmp_path / "rpo", max_steps=4, callbacks=[rpo_cache()]).fit(make_module(), datamodule=data)
    module = make_module()
    make_trainer(tmp_path / "baseline", max_steps=1).fit(module, datamodule=data)
    assert all(group.request.prefix_ids == () for group in module.groups)


def test_a_data_module_is_read_anew_for_another_tokenizer(tmp_path):
    other = load_tokenizer(REASONER)
    other.add_tokens(["+1"])
    save_policy(load_policy(REASONER), other, tmp_path)
    data, verifier = make_data(train=[{"question": "^1+1=", "answer": "2"}]), make_module().grader.verifier
    first, again = (data.read("train", "", load_tokenizer(p), verifier)[0] for p in (REASONER, str(tmp_path)))
    assert len(again.token_ids) == len(first.token_ids) - 1


def test_a_run_with_another_seed_is_told_that_questions_come_in_another_order(trained, tmp_path, monkeypatch, caplog):
    path, _ = trained
    for seed, warns in (("0", False), ("1", True)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        caplog.clear()
        trainer = make_trainer(tmp_path / seed, max_steps=3, callbacks=[rpo_cache()])
        module = make_module(rewards=[UniformRandomReward()])
        trainer.fit(module, datamodule=make_data(), ckpt_path=path, weights_only=True)
        assert ("questions come in another order" in caplog.text) == warns


def test_a_checkpoint_can_be_saved_before_there_is_a_cache(tmp_path):
    module, data = make_module(max_response_tokens=8), make_data()
    trainer = make_trainer(tmp_path, callbacks=[rpo_cache()], limit_val_batches=1)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    again, cache = make_module(max_response_tokens=8), rpo_cache()
    trainer = make_trainer(tmp_path / "again", max_steps=1, callbacks=[cache])
    trainer.validate(again, datamodule=data, ckpt_path=tmp_path / "before.ckpt", weights_only=True, verbose=False)
    trainer.fit(again, datamodule=data)
    assert len(cache.cache) == 4


def test_a_cache_to_start_from_needs_questions_to_start_with(trained, tmp_path):
    _, cache = trained
    write_cache(cache.cache, tmp_path / "start.parquet")
    trainer = make_trainer(tmp_path / "run", callbacks=[ExperienceCacheCallback(path=str(tmp_path / "start.parquet"))])
    with pytest.raises(DataError, match=r"data\.train is not set"):
        trainer.fit(make_module(), datamodule=make_data(train=""))


class ArrayReward(Reward):
    """Returns what numpy computes, as users do."""

    def score(self, group):
        return np.linspace(0, 1, len(group))


def test_neither_numpys_numbers_nor_rows_end_up_in_checkpoints_and_restored_groups_find_their_rows(tmp_path):
    module = make_module(rewards=[ArrayReward()], dynamic_sampling=DynamicSampling())
    data = make_data(train=[{**row, "notes": f"seen once{'.' * 10_000}"} for row in ArithmeticChain(16, seed=1).rows()])
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    module.buffer.add(module.groups)
    torch.save(module.buffer.state_dict(), tmp_path / "buffer.pt")
    restored = GroupBuffer(DynamicSampling())
    assert b"seen once" not in (tmp_path / "buffer.pt").read_bytes()
    restored.load_state_dicts([torch.load(tmp_path / "buffer.pt", weights_only=True)])
    assert restored.groups[0].samples[0].row == {}
    restored.attach_rows(data.prompts["train"])
    assert restored.groups == module.buffer.groups
    assert restored.groups[0].samples[0].row["notes"].startswith("seen once")
    assert restored.groups[0].rewards == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_several_updates_a_rollout_end_at_max_steps_and_are_exported_when_due(tmp_path):
    rates = []
    module = make_module(rewards=[UniformRandomReward()], passes_per_rollout=2, minibatches_per_pass=2)
    step = module._step
    module._step = lambda groups: rates.append(len(groups)) or step(groups)
    export = HuggingFaceExportCallback(every_n_steps=3)
    make_trainer(tmp_path, max_steps=6, callbacks=[export]).fit(module, datamodule=make_data())
    assert len(rates) == 6
    assert sorted(p.name for p in tmp_path.glob("policy*")) == ["policy", "policy-step=4", "policy-step=6"]


def test_no_update_is_made_of_responses_that_are_all_left_out(tmp_path, caplog):
    module = make_module(rewards=[UniformRandomReward()], mask_truncated=True, max_response_tokens=8)
    module.configure_model()
    start = {n: p.detach().clone() for n, p in module.policy.named_parameters()}
    make_trainer(tmp_path, max_epochs=1, max_steps=-1).fit(module, datamodule=make_data())
    assert module.iteration == 4
    assert all(torch.equal(p, start[n]) for n, p in module.policy.named_parameters())
    assert "unfinished and left out by model.update.mask_truncated" in caplog.text


def test_accuracy_before_training_is_told_only_of_the_questions_that_accuracy_after_is_of(tmp_path):
    for sanity, told in ((1, False), (-1, True)):
        summary = RunSummaryCallback()
        trainer = make_trainer(
            tmp_path / str(sanity), max_steps=1, callbacks=[summary], num_sanity_val_steps=sanity, limit_val_batches=2
        )
        trainer.fit(make_module(), datamodule=make_data(eval_batch_size=4))
        found = summary.summary(trainer)
        assert (found["accuracy_before"] is not None) == told
        assert found["accuracy_after"] is not None
        assert summary.state_dict()["seconds"] == summary.seconds  # the clock stands


def test_the_clock_of_the_first_iteration_starts_with_training(tmp_path):
    module = make_module(rewards=[UniformRandomReward()])
    module.timer._since -= 1000  # a thousand seconds of loading
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    assert module.record.phase_seconds["rest"] < 500


def test_a_callback_that_would_save_whatever_fails_is_refused_on_several_ranks():
    trainer = SimpleNamespace(world_size=2, callbacks=[OnExceptionCheckpoint("folder")])
    with pytest.raises(ConfigurationError, match="use ModelCheckpoint with save_on_exception"):
        LoneExceptionCallback().on_train_start(trainer, None)


@pytest.mark.parametrize("max_steps", [-1, 100])
def test_a_schedule_that_dynamic_sampling_would_cut_short_is_told(tmp_path, caplog, max_steps):
    caplog.set_level(logging.WARNING)
    module = make_module(dynamic_sampling=DynamicSampling(), lr_schedule=LearningRateSchedule("linear"))
    trainer = make_trainer(tmp_path, max_steps=max_steps, max_epochs=1, limit_train_batches=2)
    trainer.fit(module, datamodule=make_data())
    assert "set trainer.max_steps" in caplog.text


@pytest.mark.parametrize(("max_steps", "max_epochs", "updates"), [(100, 2, 8), (-1, 2, 8), (5, 2, 5), (5, -1, 5)])
def test_a_schedule_ends_with_the_run_whichever_limit_ends_it(tmp_path, max_steps, max_epochs, updates):
    module = make_module(
        rewards=[UniformRandomReward()],
        max_response_tokens=8,
        minibatches_per_pass=2,
        lr_schedule=LearningRateSchedule("linear"),
    )
    trainer = make_trainer(tmp_path, max_steps=max_steps, max_epochs=max_epochs, limit_train_batches=2)
    trainer.fit(module, datamodule=make_data())
    assert trainer.global_step == updates
    assert module.lr_schedulers().get_last_lr() == [0.0]
