"""Responses that cannot change the gradient are left out of the passes, and all others are computed."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import pandas as pd
import pytest
import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.update.advantages import (
    RLOO,
    BatchScaled,
    GroupScaled,
    MaxRL,
    ReinforcePlusPlusBaseline,
    Unscaled,
    group_advantages,
)
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import CISPO, DAPO, DPPO, DPPOKL, GRPO, GSPO, SAPO, DrGRPO, GSPOToken, Objective
from rpo_lightning.update.objectives.base import LossInputs, Normalisation
from rpo_lightning.update.reference import FrozenCopy
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_data, make_group, make_module, make_trainer

# Suffixes of 3 tokens after prompts of 3: the first group teaches, the second is all wrong, the third all right.
TEACHES, ALL_WRONG, ALL_RIGHT = [1.0, 0.0], [0.0, 0.0], [0.1] * 6
OURS = [DAPO(), GRPO(), DrGRPO(16), GSPO(), CISPO(), SAPO(), DPPO(), DPPOKL(), GSPOToken()]


def batch(*rewards, finished=None):
    return [
        make_group(r, [(7 + i, 8, 9 + i) for i in range(len(r))], prompt_ids=(1, 5 + n, 6), finished=finished)
        for n, r in enumerate(rewards)
    ]


def backward(policy, objective, groups, reference=None, **settings):
    """Gradients, metrics and the number of tokens that were computed."""
    policy.zero_grad()
    update = UpdateSettings(**{"share_prefixes": False, **settings})
    loss = PolicyLoss(policy, reference and FrozenCopy(reference), objective, update, pad_id=0)
    metrics = loss.backward(groups, group_advantages([g.rewards for g in groups]), lambda x, _: x.backward())
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return gradients, metrics, loss.processed_tokens["update"]


def assert_equal(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("objective", OURS, ids=lambda o: type(o).__name__)
def test_groups_without_advantage_are_not_computed_and_change_no_gradient(exact_policy, objective, monkeypatch):
    groups = batch(TEACHES, ALL_WRONG, ALL_RIGHT)
    gradients, metrics, tokens = backward(exact_policy, objective, groups)
    monkeypatch.setattr(Objective, "learns_from_zero_advantages", True)
    expected, metrics_of_all, tokens_of_all = backward(exact_policy, objective, groups)
    assert_equal(gradients, expected)
    assert (tokens, tokens_of_all) == (2 * 6, 10 * 6)
    # They count in the normalisation: the loss is that of all.
    assert metrics["loss/policy"] == pytest.approx(metrics_of_all["loss/policy"], abs=1e-12)
    assert metrics["loss/tokens"] == metrics_of_all["loss/tokens"] == 10 * 3


class WithOwnTerm(Objective):
    """What a user may write: a loss that does not follow the advantages."""

    normalisation: ClassVar[Normalisation] = "token"

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Maximises the likelihood of all tokens."""
        return -inputs.logprobs_BS, torch.zeros_like(inputs.mask_BS), torch.ones_like(inputs.logprobs_BS)


@pytest.mark.parametrize(
    "objective", [GRPO(beta=0.1), DAPO(entropy_bonus=0.1), WithOwnTerm()], ids=["kl", "entropy", "own"]
)
def test_objectives_that_learn_from_all_responses_get_all_of_them(exact_policy, objective):
    reference = None
    if objective.beta:
        reference = copy.deepcopy(exact_policy)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
    gradients, _, tokens = backward(exact_policy, objective, batch(ALL_WRONG, ALL_RIGHT), reference)
    assert tokens == 8 * 6
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-6


class DAPOWithOwnTerm(DAPO):
    """What a user may write who starts from a class of ours."""

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """DAPO's, and a penalty on log-probs."""
        losses_BS, clipped_BS, ratio_BS = super().token_losses(inputs)
        return losses_BS + inputs.logprobs_BS.square(), clipped_BS, ratio_BS


def test_a_loss_of_ones_own_does_not_inherit_that_it_ignores_responses(exact_policy):
    _, _, tokens = backward(exact_policy, DAPOWithOwnTerm(), batch(TEACHES, ALL_WRONG))
    assert tokens == 4 * 6


def test_responses_that_mask_truncated_leaves_out_are_not_computed_even_with_a_kl_penalty(exact_policy):
    reference = copy.deepcopy(exact_policy)
    groups = batch(TEACHES, finished=[True, False])
    _, metrics, tokens = backward(exact_policy, GRPO(beta=0.1), groups, reference, mask_truncated=True)
    assert (tokens, metrics["loss/tokens"]) == (6, 3)


def test_an_update_that_nothing_teaches_gives_every_parameter_a_gradient_of_zero(exact_policy):
    gradients, metrics, tokens = backward(exact_policy, DAPO(), batch(ALL_WRONG, ALL_RIGHT))
    assert gradients.keys() == dict(exact_policy.named_parameters()).keys()
    assert all(bool((g == 0).all()) for g in gradients.values())
    assert tokens == 6  # one response, for the metrics
    assert metrics["loss/policy"] == 0
    assert metrics["loss/entropy"] > 0


def test_an_advantage_that_is_no_number_is_not_left_out(exact_policy):
    _, metrics, _ = backward(exact_policy, DAPO(), batch([float("nan"), 0.0], ALL_WRONG))
    assert math.isnan(metrics["loss/policy"])


@pytest.mark.parametrize(
    "estimator",
    [GroupScaled(), BatchScaled(), Unscaled(), RLOO(), MaxRL(), ReinforcePlusPlusBaseline()],
    ids=lambda e: type(e).__name__,
)
def test_equal_rewards_have_advantages_of_exactly_zero(estimator):
    # In floating point the mean of six times 0.1 is not 0.1.
    assert sum([0.1] * 6) / 6 != 0.1
    groups = [make_group(r) for r in ([0.1] * 6, [1.0, 0.0], [0.7] * 3)]
    first, second, third = estimator.advantages(groups, {}, Ranks())
    assert first.tolist() == [0.0] * 6
    assert third.tolist() == [0.0] * 3
    assert (second != 0).all()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_is_the_same_with_fewer_tokens_computed(tmp_path, passes, monkeypatch):
    def run(folder):
        module = make_module(objective=GRPO(), group_size=2, passes_per_rollout=passes)
        trainer = make_trainer(folder, max_steps=3 * passes)
        trainer.fit(module, make_data())
        metrics = pd.read_csv(folder / "metrics.csv")
        return dict(module.policy.named_parameters()), metrics

    weights, metrics = run(tmp_path / "left_out")
    monkeypatch.setattr(Objective, "learns_from_zero_advantages", True)
    expected, of_all = run(tmp_path / "all")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0, msg=name)
    equal = of_all["rollout/zero_variance_share"]
    assert 0 < equal.mean() < 1
    assert (metrics["tokens/update"] <= of_all["tokens/update"] * (1.2 - equal)).all()
    assert metrics["loss/tokens"].tolist() == of_all["loss/tokens"].tolist()
    if passes > 1:
        assert metrics["tokens/old_logprobs"].sum() < of_all["tokens/old_logprobs"].sum()


@pytest.mark.parametrize(("objective", "remembered"), [(DAPO(), 0), (WithOwnTerm(), 2)], ids=["DAPO", "own"])
def test_the_guard_does_not_remember_an_update_of_one_response(tmp_path, objective, remembered):
    module = make_module(objective=objective, rewards=[lambda prompt, response, answer: 1.0], group_size=2)
    make_trainer(tmp_path, max_steps=2).fit(module, make_data())
    assert "mismatch/logprob_mean" in pd.read_csv(tmp_path / "metrics.csv")
    assert len(module.guard.state_dict()["means"]) == remembered
