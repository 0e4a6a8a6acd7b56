"""Numbers that are not finite change nothing, are counted, and end a run that has nothing else; odd rollouts."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from dataclasses import replace

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback

from rpo_lightning.callbacks import RunSummaryCallback
from rpo_lightning.core.errors import ConfigurationError, DataError, UpdateError
from rpo_lightning.core.types import Batch, Completion, Prompt, RolloutRequest
from rpo_lightning.rewards import AccuracyReward, Reward, UniformRandomReward
from rpo_lightning.rollout import TransformersEngine
from rpo_lightning.update.importance import NoCorrection
from rpo_lightning.update.schedule import LearningRateSchedule
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_data, make_module, make_trainer

NAN, INF = float("nan"), float("inf")


class Given(TransformersEngine):
    """Changes what it has sampled."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def generate(self, requests, sampling, seed, on_finished=None):
        return [[self.change(c) for c in of_group] for of_group in super().generate(requests, sampling, seed)]


def first_logprob(value):
    return lambda c: replace(c, logprobs=(value, *c.logprobs[1:]))


def of_loss(module, value):
    """Make the loss ``value``, and gradients with it."""
    weigh = module.objective.sequence_weights
    module.objective.sequence_weights = lambda *given: weigh(*given) * value
    return lambda: module.objective.__dict__.pop("sequence_weights")


def of_gradient(module, value):
    """Make an entry of the gradient ``value``, of a loss that is finite."""
    parameter = next(module.policy.parameters())

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return parameter.register_hook(spoil).remove


def of_policys_logprobs(module, value):
    """Make the policy's output ``value`` in the update."""
    norm = module.policy.model.norm
    return norm.register_forward_hook(lambda _, __, out: out * value if torch.is_grad_enabled() else out).remove


def of_weights(module, value):
    """Make a weight ``value``: rollout and update are computed with it."""
    weight = module.policy.model.norm.weight
    before = weight.detach().clone()
    weight.data[0] = value
    module.policy_version += 1

    def mend():
        weight.data.copy_(before)
        module.policy_version += 1

    return mend


def of_engine(module, value):
    """Make a log-prob of the engine ``value``."""
    module.engine.change = first_logprob(value)
    return lambda: setattr(module.engine, "change", lambda c: c)


class Fault(Callback):
    """Has a fault in some iterations, and looks at what they leave."""

    def __init__(self, begin, value, iterations):
        self.begin, self.value, self.iterations = begin, value, iterations
        self.same = []

    def state(self, trainer, module):
        of_optimizer = trainer.optimizers[0].state_dict()
        weights = {n: p.detach().clone() for n, p in module.policy.named_parameters()}
        schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        return copy.deepcopy((weights, of_optimizer, schedule)), trainer.global_step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = self.state(trainer, module)
        self.mend = self.begin(module, self.value) if module.iteration in self.iterations else None
        if self.mend and self.begin is of_weights:
            module.engine.load_weights(module.loaded_policy, module.policy_version)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.mend:
            self.mend()
        self.same.append(equal(self.before, self.state(trainer, module)))


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def faulty(folder, fault, value, iterations, **settings):
    callback = Fault(fault, value, iterations)
    module = make_module(
        rewards=[UniformRandomReward()], engine=Given(lambda c: c), max_response_tokens=16, group_size=2,
        lr_schedule=LearningRateSchedule("linear"), **settings,
    )  # fmt: skip
    trainer = make_trainer(folder, max_steps=2, callbacks=[callback, RunSummaryCallback()])
    return module, trainer, callback


FAULTS = [
    (of_loss, NAN, "of log-probs that are finite|the loss is nan"),
    (of_loss, INF, "the loss is"),
    (of_gradient, NAN, "the gradient norm is nan, of a loss that is finite: lower the learning rate"),
    (of_gradient, -INF, "the gradient norm is inf, of a loss that is finite"),
    (of_policys_logprobs, NAN, "the policy's log-probs are not finite"),
    (of_weights, NAN, "the policy's log-probs are not finite"),
    (of_weights, INF, "the policy's log-probs are not finite"),
    (of_engine, NAN, "the rollout engine's log-probs are not finite"),
    (of_engine, -INF, "the rollout engine's log-probs are not finite"),
]


@pytest.mark.parametrize(("fault", "value", "told"), FAULTS)
def test_an_update_of_numbers_that_are_not_finite_is_skipped_counted_and_told(tmp_path, caplog, fault, value, told):
    caplog.set_level(logging.WARNING)
    module, trainer, callback = faulty(tmp_path, fault, value, {1})
    trainer.fit(module, datamodule=make_data())
    assert callback.same == [False, True, False]  # weights, optimizer, schedule and the number of updates
    assert module.iteration == 3
    assert trainer.global_step == 2
    log = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="update/skipped")
    assert log["update/skipped"].tolist() == [0, 1, 0]
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_updates"] == 1
    messages = [r.getMessage() for r in caplog.records if "an update was skipped" in r.getMessage()]
    assert len(messages) == 1
    assert pd.Series(messages).str.contains(told).all(), messages
    assert all(p.isfinite().all() for p in module.policy.parameters())


@pytest.mark.parametrize(("fault", "value", "told"), [FAULTS[2], FAULTS[4], FAULTS[7]])
def test_too_many_in_a_row_stop_the_run_with_a_line_and_leave_the_policy(tmp_path, fault, value, told):
    module, trainer, _ = faulty(tmp_path, fault, value, {0, 2, 3, 4})
    module.configure_model()
    with pytest.raises(UpdateError, match=f"3 updates in a row were skipped, and the policy is as .* before: .*{told}"):
        trainer.fit(module, datamodule=make_data())
    assert module.iteration == 4
    assert trainer.global_step == 1
    assert module.watch.skipped == 4


def test_the_number_in_a_row_is_a_setting_survives_a_checkpoint_and_0_never_stops(tmp_path):
    module, trainer, _ = faulty(tmp_path / "never", of_loss, NAN, set(range(5)), max_skipped=0)
    trainer.fit(module, datamodule=make_data())
    assert (module.iteration, module.watch.skipped) == (7, 5)
    module, trainer, _ = faulty(tmp_path / "first", of_loss, NAN, set(range(5)))
    trainer.fit_loop.max_epochs, trainer.limit_train_batches = 1, 2
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    module, trainer, _ = faulty(tmp_path / "second", of_loss, NAN, set(range(5)))
    with pytest.raises(UpdateError, match="3 updates in a row"):
        trainer.fit(module, datamodule=make_data(), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    assert module.iteration == 2
    with pytest.raises(ConfigurationError, match=r"model\.update\.max_skipped must be at least 0"):
        UpdateSettings(max_skipped=-1)


def test_one_of_several_updates_of_an_iteration_is_skipped_alone(tmp_path):
    module, trainer, _ = faulty(tmp_path, of_loss, NAN, set(), minibatches_per_pass=2)
    weigh, calls = module.objective.sequence_weights, []

    def weights(*given):
        calls.append(given)
        return weigh(*given) * (NAN if len(calls) == 1 else 1)

    module.objective.sequence_weights = weights
    trainer.fit(module, datamodule=make_data())
    log = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="update/skipped")
    assert log["update/skipped"].tolist() == [1, 0]
    assert trainer.global_step == 2


# -- odd rollouts ---------------------------------------------------------------------------------


def trained(folder, change, steps=1, epochs=None, **settings):
    module = make_module(engine=Given(change), max_response_tokens=16, group_size=2, **settings)
    module.configure_model()
    before = [p.detach().clone() for p in module.policy.parameters()]
    length = {"max_steps": -1, "max_epochs": epochs} if epochs else {"max_steps": steps}
    make_trainer(folder, **length).fit(module, datamodule=make_data())
    changed = any(not torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    return module, changed


class Half(Reward):
    """1 for the first half of a group and 0 for the others."""

    def score(self, group):
        return [float(i < len(group) / 2) for i in range(len(group))]


def test_responses_that_end_at_once_are_one_token_long_and_are_learned_from(tmp_path, tokenizer):
    end = tokenizer.eos_token_id
    module, changed = trained(
        tmp_path, lambda c: Completion((end,), (), True), rewards=[Half()], importance_correction=NoCorrection()
    )
    assert {s.length for g in module.groups for s in g.samples} == {1}
    assert {s.response for g in module.groups for s in g.samples} == {""}
    assert changed


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_an_empty_suffix_has_no_token_in_the_loss_and_its_group_is_learned_from(tmp_path, share_prefixes):
    """Its group's other member keeps its advantage, as computed from both rewards."""
    ended = itertools.count()
    module, changed = trained(
        tmp_path, lambda c: c if next(ended) % 2 else Completion((), (), True), rewards=[Half()],
        share_prefixes=share_prefixes,
    )  # fmt: skip
    lengths = [s.length for g in module.groups for s in g.samples]
    assert lengths[::2] == [0] * 4
    assert pd.read_csv(tmp_path / "metrics.csv")["loss/tokens"].tolist() == [sum(lengths)]
    assert changed


def test_a_rollout_of_nothing_but_empty_suffixes_makes_no_update(tmp_path):
    module, changed = trained(tmp_path, lambda c: Completion((), (), True), rewards=[Half()], epochs=1)
    assert module.iteration == 4
    assert module.global_step == 0
    assert not changed


def test_a_prefix_that_holds_the_answer_is_part_of_the_response_and_the_suffix_may_still_spoil_it(tokenizer):
    module = make_module(rewards=[AccuracyReward()], max_response_tokens=64)
    texts = iter(["", "+1", "#5"])
    module.engine = Given(lambda c: replace(c, token_ids=tuple(tokenizer.encode(next(texts)))))
    module.configure_model()
    module.engine.load_weights(module.loaded_policy, module.policy_version)
    prompt = Prompt("q", "2+2", tuple(tokenizer.encode("2+2")), "4")
    request = RolloutRequest(prompt, tuple(tokenizer.encode("2+2=4#4")), max_new_tokens=4)
    (group,) = module.roll_out(Batch([request]), 3, module.sampling, 0)
    assert [s.response for s in group.samples] == ["2+2=4#4", "2+2=4#4+1", "2+2=4#4#5"]
    assert group.rewards == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("masked", [True, False])
def test_responses_that_are_all_cut_off_are_left_out_or_learned_from_as_the_setting_says(tmp_path, caplog, masked):
    caplog.set_level(logging.WARNING)
    settings = {"rewards": [Half()], "mask_truncated": masked, "max_idle_iterations": 2}
    cut_off = lambda c: replace(c, finished=False)  # noqa: E731
    if masked:
        with pytest.raises(UpdateError, match=r"2 iterations in a row have not changed the policy.*100% are cut off"):
            trained(tmp_path, cut_off, **settings)
        assert "no response of an iteration is in the loss" in caplog.text
    else:
        _, changed = trained(tmp_path, cut_off, **settings)
        assert changed


def test_groups_that_are_all_without_variance_change_no_weight_and_are_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    module, changed = trained(tmp_path, lambda c: c, steps=3, rewards=[Equal()], optimizer=optimizer)
    assert not changed
    assert module.global_step == 3
    assert "all advantages are zero, and nothing is learned" in caplog.text


class Equal(Reward):
    """The same for every response."""

    def score(self, group):
        return [1.0] * len(group)


def test_questions_that_are_all_dropped_are_an_error_with_their_number_and_the_limit(tmp_path):
    with pytest.raises(DataError, match=r"max_prompt_tokens"):
        make_trainer(tmp_path).fit(make_module(), datamodule=make_data(max_prompt_tokens=1))
