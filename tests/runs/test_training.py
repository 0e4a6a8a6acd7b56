"""Whole runs through ``Trainer.fit``: RPO and full path, refills, several updates, exact resume."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, FractionOfShortestCut, UniformCut
from rpo_lightning.cache.parquet import read_cache
from rpo_lightning.cache.refresh import CorrectMemberRefresh
from rpo_lightning.callbacks import (
    CompletionsCallback,
    ExperienceCacheCallback,
    HuggingFaceExportCallback,
    RunSummaryCallback,
    WeightSyncCallback,
)
from rpo_lightning.core.errors import CacheError, ConfigurationError, UpdateError
from rpo_lightning.core.types import GoldAnswer
from rpo_lightning.policy.parallel.base import GradientAccumulation
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.rewards import AccuracyReward, LengthAwareAccuracyReward, UniformRandomReward
from rpo_lightning.update.advantages import BatchScaled
from rpo_lightning.update.dynamic_sampling import DynamicSampling, GroupBuffer
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO, GRPO
from tests.conftest import cache_contents, make_data, make_group, make_module, make_trainer, passes_with_gradient


def metrics(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv")


def parameters(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.policy.named_parameters()}


def test_eager_rpo_fills_the_cache_first_and_then_decodes_suffixes_only(tmp_path):
    cache = ExperienceCacheCallback(cut=FractionOfShortestCut(0.5))
    # With a reference and two updates an iteration, so that every phase takes place.
    module = make_module(rewards=[UniformRandomReward()], objective=GRPO(beta=0.01), minibatches_per_pass=2)
    make_trainer(tmp_path, callbacks=[cache], max_steps=6).fit(module, datamodule=make_data())
    assert len(cache.cache) == 16
    assert cache.initialisation_tokens > 16
    log = metrics(tmp_path)
    assert (log["rollout/kept_prefix_tokens"] > 5).all()
    assert (log["rollout/decoded_tokens_per_sample"] < log["rollout/response_tokens"]).all()
    assert log["loss/total"].map(math.isfinite).all()
    assert log["cache/age"].iloc[-1] > 0
    for name in (
        "reward/mean",
        "loss/entropy",
        "loss/clip_share",
        "rollout/zero_variance_share",
        "rollout/all_right_share",
        "rollout/all_wrong_share",
        "cache/correct_share",
        "tokens/prefill",
        "tokens/decode",
        "tokens/update",
    ):
        assert log[name].notna().all(), name
    phases = log[[name for name in log.columns if name.startswith("time/")]]
    assert set(phases.columns) == {
        "time/prefill",
        "time/decode",
        "time/reward",
        "time/old_logprobs",
        "time/reference_logprobs",
        "time/update",
        "time/sync",
        "time/cache",
        "time/rest",
    }
    assert len(phases) == 3
    assert (phases.iloc[1:] > 0).all(axis=None)
    # The cache is refreshed after an iteration has been recorded and counts for the next one.
    assert (phases.iloc[0].drop("time/cache") > 0).all()
    assert math.isnan(phases["time/cache"].iloc[0])


def test_lazy_rpo_starts_on_the_full_path_and_cuts_from_the_second_visit_on(tmp_path):
    cache = ExperienceCacheCallback(cut=UniformCut(40), initialisation="lazy")
    make_trainer(tmp_path, callbacks=[cache], max_steps=8).fit(
        make_module(rewards=[UniformRandomReward()]), datamodule=make_data()
    )
    log = metrics(tmp_path)
    assert cache.initialisation_tokens == 0
    assert log["cache/entries"].tolist() == [4, 8, 12, 16, 16, 16, 16, 16]
    assert (log["rollout/full_path_share"].iloc[:4] == 1).all()
    assert (log["rollout/full_path_share"].iloc[4:] < 1).all()


def test_anchored_rpo_caches_correct_responses_only(tmp_path):
    cache = ExperienceCacheCallback(cut=AnchoredCut(), refresh=CorrectMemberRefresh(), initialisation="lazy")
    make_trainer(tmp_path, callbacks=[cache], max_steps=4).fit(make_module(), datamodule=make_data())
    responses = [e.response for e in cache.cache if e.response is not None]
    assert responses
    assert all(r.correct and r.finished for r in responses)


def test_without_the_cache_callback_every_rollout_takes_the_full_path(tmp_path):
    make_trainer(tmp_path).fit(make_module(objective=GRPO()), datamodule=make_data())
    log = metrics(tmp_path)
    assert (log["rollout/full_path_share"] == 1).all()
    assert not [c for c in log.columns if c.startswith("cache/")]


def test_an_update_raises_the_likelihood_of_better_than_average_responses(tmp_path):
    module = make_module(rewards=[UniformRandomReward()], optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=make_data())
    groups = copy.deepcopy(module.groups)
    module._loss.store_old_logprobs(groups)
    gain = 0.0
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for reward, new, completion in zip(group.rewards, group.old_logprobs, group.completions, strict=True):
            gain += (reward - mean) * (sum(new) - sum(completion.logprobs))
    assert gain > 0


def test_dynamic_sampling_refills_until_an_update_is_full(tmp_path):
    module = make_module(dynamic_sampling=DynamicSampling(max_refills=50))
    trainer = make_trainer(tmp_path, max_steps=2)
    sizes = []
    update = module._update
    module._update = lambda groups, surplus: (sizes.append((len(groups), len(surplus))), update(groups, surplus))[1]
    trainer.fit(module, datamodule=make_data(train=make_data().sources["train"]))
    assert [size for size, _ in sizes] == [4, 4]
    assert module.iteration > 2  # zero-variance groups were dropped on the way
    assert all(g.has_variance for g in module.buffer.groups)


def test_refills_are_bounded():
    buffer = GroupBuffer(DynamicSampling(max_refills=2))
    for refills in range(3):
        buffer.add([make_group([1.0, 1.0]), make_group([0.0, 0.0])])
        assert buffer.is_ready(4) == (refills == 2)
        buffer.refill()
    assert buffer.take(4) == []
    assert not buffer.is_ready(4)


def test_surplus_groups_wait_with_the_log_probs_of_the_policy_that_sampled_them(tmp_path):
    module = make_module(
        rewards=[UniformRandomReward()],
        dynamic_sampling=DynamicSampling(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    buffered = make_group([0.0, 1.0], [(7, 8, 2), (9, 2)], prompt_ids=(1, 5, 6))
    module.buffer.add([buffered])
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    assert len(module.buffer.groups) == 1
    waiting = module.buffer.groups[0]
    for old, completion in zip(waiting.old_logprobs, waiting.completions, strict=True):
        torch.testing.assert_close(torch.tensor(old), torch.tensor(completion.logprobs), atol=1e-4, rtol=0)
    restored = GroupBuffer(DynamicSampling())
    restored.load_state_dicts([module.buffer.state_dict()])
    assert restored.groups == module.buffer.groups


def test_waiting_groups_survive_a_checkpoint_that_may_hold_nothing_but_plain_data(tmp_path):
    group = make_group([0.0, 1.0], [(7, 8, 2), (9, 2)])
    answer = GoldAnswer("4.9", "2", tolerances=(0.1, 0.0))
    prompt = dataclasses.replace(group.request.prompt, answer=answer)
    group.request = dataclasses.replace(group.request, prompt=prompt)
    group.samples = [dataclasses.replace(sample, answer=answer) for sample in group.samples]
    buffer, restored = GroupBuffer(DynamicSampling()), GroupBuffer(DynamicSampling())
    buffer.add([group])
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored.load_state_dicts([torch.load(tmp_path / "buffer.pt", weights_only=True)])
    assert restored.groups == [group]
    for again in (restored.groups[0].request.prompt.answer, *(s.answer for s in restored.groups[0].samples)):
        assert isinstance(again, GoldAnswer)
        assert (again.parts, again.tolerances) == (answer.parts, answer.tolerances)


def test_several_updates_per_rollout_use_the_clipped_ratio(tmp_path):
    module = make_module(
        rewards=[UniformRandomReward()],
        objective=DAPO(clip_low=0.01, clip_high=0.01),
        passes_per_rollout=2,
        minibatches_per_pass=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    make_trainer(tmp_path, max_steps=4).fit(module, datamodule=make_data())
    assert module.iteration == 1
    assert metrics(tmp_path)["loss/clip_share"].iloc[-1] > 0


def test_a_reference_model_is_there_only_with_beta_and_stays_the_starting_policy(tmp_path):
    module = make_module(objective=GRPO(beta=0.1), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    module.configure_model()
    start = parameters(module)
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data(batch_size=8))
    log = metrics(tmp_path)
    assert log["loss/kl"].iloc[0] == pytest.approx(0.0, abs=1e-6)
    assert log["loss/kl"].iloc[1] > 1e-6
    reference = dict(module._loss.reference.model.named_parameters())
    assert all(torch.equal(start[n], reference[n]) for n in start)
    assert not any("reference" in n for n in module.state_dict())
    plain = make_module()
    plain.configure_model()
    assert plain._loss.reference is None


def test_the_engine_is_synced_once_for_each_change_of_the_policy(tmp_path):
    sync = WeightSyncCallback()
    module = make_module(passes_per_rollout=2, rewards=[UniformRandomReward()])
    loads = []
    module.engine._copy_weights = lambda policy: loads.append(module.policy_version)
    make_trainer(tmp_path, max_steps=6, callbacks=[sync]).fit(module, datamodule=make_data())
    assert loads == [0, 2, 4]
    assert sync.syncs == 3


def test_a_precision_that_scales_gradients_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu")])
    with pytest.raises(ConfigurationError, match=r"trainer\.precision=16-mixed.*use bf16-mixed"):
        trainer.fit(make_module(), datamodule=make_data())


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_ruins_the_policy(tmp_path):
    module = make_module(rewards=[UniformRandomReward()], max_skipped=1)
    module.configure_model()
    start = parameters(module)
    module._loss.objective.sequence_weights = lambda lengths, *_: torch.full((len(lengths),), float("nan"))
    with pytest.raises(UpdateError, match=r"1 updates in a row were skipped.*the loss is nan"):
        make_trainer(tmp_path).fit(module, datamodule=make_data())
    assert all(torch.equal(start[n], p) for n, p in parameters(module).items())


def rpo_run(folder, stop: int, resume=None, more=(), **trainer_settings):
    """A DAPO + RPO run with everything that has state: buffer, cache, schedule, epochs of four batches."""
    from rpo_lightning.update.schedule import LearningRateSchedule

    cache = ExperienceCacheCallback(cut=FractionOfShortestCut(0.5))
    module = make_module(
        rewards=[LengthAwareAccuracyReward()],
        dynamic_sampling=DynamicSampling(max_refills=3),
        lr_schedule=LearningRateSchedule("linear", warmup_share=0.2),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    summary = RunSummaryCallback()
    trainer = make_trainer(folder, max_steps=stop, callbacks=[cache, summary, checkpoint, *more], **trainer_settings)
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume, weights_only=True if resume else None)
    return module, cache, summary


@pytest.mark.parametrize("interrupted_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_continues_as_the_uninterrupted_one(tmp_path, interrupted_at, monkeypatch):
    whole, whole_cache, whole_summary = rpo_run(tmp_path / "whole", stop=6)
    # The same run, taken up in new objects from a checkpoint written on the way.
    resumed, resumed_cache, resumed_summary = rpo_run(
        tmp_path / "resumed", stop=6, resume=tmp_path / "whole" / f"step={interrupted_at}.ckpt"
    )
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name
    assert cache_contents(resumed_cache.cache) == cache_contents(whole_cache.cache)
    assert whole.buffer.groups == resumed.buffer.groups
    assert whole.iteration == resumed.iteration
    assert whole_summary.decoded_tokens == resumed_summary.decoded_tokens
    assert whole_cache.initialisation_tokens == resumed_cache.initialisation_tokens


def test_a_crash_keeps_the_cache_and_a_checkpoint_to_go_on_from(tmp_path):
    class CrashError(Exception):
        pass

    cache = ExperienceCacheCallback(cut=UniformCut(10), initialisation="lazy")
    module = make_module()
    step = module.training_step

    def crash_on_third(requests, batch_idx):
        if batch_idx == 2:
            raise CrashError
        return step(requests, batch_idx)

    module.training_step = crash_on_third
    checkpoint = ModelCheckpoint(tmp_path, filename="crash", save_on_exception=True)
    with pytest.raises(CrashError):
        make_trainer(tmp_path, callbacks=[cache, checkpoint]).fit(module, datamodule=make_data())
    saved = ExperienceCache(tokenizer_fingerprint(module.tokenizer))
    saved = read_cache(tmp_path / "cache.parquet", saved.tokenizer_fingerprint)
    assert len(saved) == 8
    (crashed,) = [p for p in tmp_path.glob("*.ckpt")]
    again = ExperienceCacheCallback(cut=UniformCut(10), initialisation="lazy")
    resumed = make_module()
    make_trainer(tmp_path, callbacks=[again]).fit(resumed, datamodule=make_data(), ckpt_path=crashed)
    assert len(again.cache) == 12  # the interrupted batch was made up for


@pytest.mark.parametrize("failing_update", [1, 2])
def test_a_run_that_ended_within_an_update_is_taken_up_before_it(tmp_path, failing_update, monkeypatch):
    """Groups that waited for it are not lost, and the seeds are those that it had."""
    whole, whole_cache, _ = rpo_run(tmp_path / "whole", stop=4)
    step = GradientAccumulation.step

    def interrupted(self, *arguments):
        if self.module.global_step == failing_update:
            raise KeyError("in the middle of an update")
        return step(self, *arguments)

    crash = ModelCheckpoint(tmp_path, filename="crash", every_n_train_steps=100, save_on_exception=True)
    with monkeypatch.context() as patch:
        patch.setattr(GradientAccumulation, "step", interrupted)
        with pytest.raises(KeyError):
            rpo_run(tmp_path / "crashed", stop=4, more=[crash])
    resumed, resumed_cache, _ = rpo_run(tmp_path / "resumed", stop=4, resume=tmp_path / "crash.ckpt")
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name
    assert cache_contents(resumed_cache.cache) == cache_contents(whole_cache.cache)
    assert whole.buffer.groups == resumed.buffer.groups
    assert whole.iteration == resumed.iteration


@pytest.mark.parametrize("parts", [1, 2])
def test_advantages_are_scaled_by_the_batch_however_many_updates_it_is_split_into(tmp_path, parts):
    module = make_module(advantages=BatchScaled(), minibatches_per_pass=parts)
    given = []
    roll_out = module.roll_out

    def with_rewards(requests, samples, *args):
        groups = roll_out(requests, samples, *args)
        for number, group in enumerate(groups):
            group.rewards = [float(i % 2) * (1 + 9 * (number // 2)) for i in range(samples)]
        return groups

    def note(self, groups, advantages, *args):
        given.extend(a.abs().max().item() for a in advantages)
        return backward(self, groups, advantages, *args)

    module.roll_out = with_rewards
    backward = PolicyLoss.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLoss, "backward", note)
        make_trainer(tmp_path, max_steps=parts).fit(module, datamodule=make_data())
    rewards = [float(i % 2) * scale for scale in (1, 1, 10, 10) for i in range(module.group_size)]
    deviation = torch.tensor(rewards).std().item()
    assert given == pytest.approx([0.5 / deviation, 0.5 / deviation, 5 / deviation, 5 / deviation], rel=1e-5)


def test_the_cache_is_filled_in_the_precision_of_later_rollouts(tmp_path):
    module = make_module(max_response_tokens=16)
    generate, is_mixed = module.engine.generate, []

    def note(*args, **kwargs):
        is_mixed.append(torch.is_autocast_enabled("cpu"))
        return generate(*args, **kwargs)

    module.engine.generate = note
    cache = ExperienceCacheCallback(keep_unfinished=True)
    trainer = make_trainer(tmp_path, callbacks=[cache], max_steps=1, precision="bf16-mixed")
    trainer.fit(module, datamodule=make_data())
    assert len(cache.cache) == 16
    assert is_mixed == [True, True]


def test_a_cache_of_another_data_set_is_refused(tmp_path):
    first = ExperienceCacheCallback(initialisation="lazy")
    make_trainer(tmp_path, callbacks=[first], max_steps=1).fit(make_module(), datamodule=make_data())
    other = ExperienceCacheCallback(path=str(tmp_path / "cache.parquet"))
    rows = [{"question": f"{i}a+1=", "answer": str(i + 1)} for i in range(8)]
    with pytest.raises(CacheError, match=r"cache\.parquet: made for another data set"):
        make_trainer(tmp_path / "other", callbacks=[other]).fit(make_module(), datamodule=make_data(train=rows))


def test_a_run_starts_from_a_saved_cache_and_samples_only_what_it_lacks(tmp_path):
    first = ExperienceCacheCallback(initialisation="lazy", keep_unfinished=True)
    make_trainer(tmp_path, callbacks=[first], max_steps=1).fit(make_module(), datamodule=make_data())
    known = {entry.uid for entry in first.cache}
    assert len(known) == 4
    second = ExperienceCacheCallback(path=str(tmp_path / "cache.parquet"), keep_unfinished=True)
    module, data = make_module(), make_data()
    generate, calls = module.engine.generate, []

    def note(requests, *args, **kwargs):
        completions = generate(requests, *args, **kwargs)
        calls.append((requests, completions))
        return completions

    module.engine.generate = note
    make_trainer(tmp_path / "second", callbacks=[second], max_steps=1).fit(module, datamodule=data)
    assert len(second.cache) == 16
    # The initialisation, then the rollout of the only iteration.
    (filling, completions), (rollout, _) = calls
    lacking = [prompt.token_ids for prompt in data.prompts["train"] if prompt.uid not in known]
    assert len(lacking) == 12
    assert sorted(request.token_ids for request in filling) == sorted(lacking)
    assert {request.n for request in filling} == {1}
    assert second.initialisation_tokens == sum(len(c.token_ids) for (c,) in completions)
    assert [request.n for request in rollout] == [4] * 4


def test_best_of_k_initialisation_caches_more_correct_responses(tmp_path):
    shares = []
    for k in (1, 8):
        cache = ExperienceCacheCallback(initial_samples=k)
        make_trainer(tmp_path / str(k), callbacks=[cache], max_steps=1).fit(make_module(), datamodule=make_data())
        initial = ExperienceCache(cache.cache.tokenizer_fingerprint)
        initial = read_cache(tmp_path / str(k) / "cache.parquet", initial.tokenizer_fingerprint)
        shares.append(initial.statistics(step=1)["correct_share"])
    assert shares[1] > shares[0]


def test_a_module_that_was_looked_at_before_trains_with_the_ranks_of_its_trainer(tmp_path):
    module = make_module()
    module.configure_model()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=make_data())
    assert module._loss.ranks is module.ranks
    assert module.ranks._strategy is trainer.strategy


def test_the_exported_policy_is_an_ordinary_folder_with_the_trained_weights(tmp_path):
    module = make_module(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    make_trainer(tmp_path, max_steps=2, callbacks=[HuggingFaceExportCallback(every_n_steps=1)]).fit(
        module, datamodule=make_data()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trained = parameters(module)
    assert all(torch.equal(trained[n], p) for n, p in loaded.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "$"
    assert {p.name for p in tmp_path.glob("policy*")} == {"policy", "policy-step=1", "policy-step=2"}


def test_completions_are_logged_as_a_table_with_prefix_and_suffix_apart(tmp_path):
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    cache = ExperienceCacheCallback(cut=UniformCut(10))
    make_trainer(
        tmp_path, logger=logger, callbacks=[cache, CompletionsCallback(every_n_batches=1, groups=1)], max_steps=2
    ).fit(make_module(), datamodule=make_data())
    table = pd.read_json(tmp_path / "completions.jsonl", lines=True, dtype=str)
    assert len(table) == 4
    assert (table["prefix"].str.len() > 5).all()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert "rollout/decoded_tokens_per_sample" in events.Tags()["scalars"]
    assert "completions/text_summary" in events.Tags()["tensors"]


def test_completions_are_tables_in_mlflow_too(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny, which no extra brings")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask before they keep runs in files
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    completions = CompletionsCallback(every_n_batches=1, groups=1)
    make_trainer(tmp_path, logger=logger, callbacks=[completions], max_steps=2).fit(
        make_module(), datamodule=make_data()
    )
    client = mlflow.MlflowClient(f"file:{tmp_path}")
    names = [file.path for file in client.list_artifacts(logger.run_id, "completions")]
    assert names == ["completions/step-000001.json", "completions/step-000002.json"]
    folder = Path(client.get_run(logger.run_id).info.artifact_uri.removeprefix("file:"))
    tables = [pd.read_json(folder / name, orient="split", dtype=str) for name in names]
    written = pd.read_json(next(tmp_path.rglob("completions.jsonl")), lines=True, dtype=str)
    assert list(pd.concat(tables)["suffix"]) == list(written["suffix"])
    assert list(tables[0].columns) == list(written.columns)


def test_a_policy_object_needs_its_tokenizer_and_trains_in_place(tmp_path, policy, tokenizer):
    with pytest.raises(ConfigurationError, match=r"model\.tokenizer"):
        make_module(policy=policy)
    before = policy.model.norm.weight.detach().clone()
    module = make_module(policy=policy, tokenizer=tokenizer, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    assert not torch.equal(before, policy.model.norm.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, r"group_size must be at least 2, got 1"),
        ({"max_response_tokens": 0}, r"max_response_tokens must be at least 1"),
        ({"group_size": 2.5}, r"model\.group_size is a whole number, got 2\.5"),
        ({"rewards": []}, r"model\.rewards is empty"),
        ({"rewards": AccuracyReward()}, r"model\.rewards is a list of rewards and functions, got AccuracyReward"),
        ({"policy": "./no/such/folder"}, r"\./no/such/folder: no such model folder"),
        ({"policy": "embedded:nothing"}, r"no such embedded model: use embedded:arithmetic-reasoner"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make_module(**settings)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    trained, passes = [], []
    for checkpointing in (False, True):
        module = make_module(
            rewards=[UniformRandomReward()],
            gradient_checkpointing=checkpointing,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        module.configure_model()
        start = parameters(module)
        with_gradient = passes_with_gradient(module.policy)
        make_trainer(tmp_path / str(checkpointing), max_steps=1).fit(module, datamodule=make_data())
        trained.append(parameters(module))
        passes.append(with_gradient)
        assert all((value - start[name]).abs().max() > 1e-5 for name, value in trained[-1].items())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-6, rtol=0)
    # Every layer of every micro-batch was computed a second time, in the backward pass.
    once, twice = passes
    assert once
    assert sorted(twice) == sorted(once * 2)
