"""Objectives equal hand-computed numbers, and clip and penalise where they should."""

from __future__ import annotations

import math

import pytest
import torch

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.objectives import CISPO, DAPO, GRPO, GSPO, DrGRPO, LossInputs
from rpo_lightning.update.objectives.base import k3_divergence

# Two sequences with two and one loss tokens. The first has a positive advantage, the second a negative one.
RATIOS = [[1.5, 0.5], [1.0, 0.5]]
ADVANTAGES = [1.0, -1.0]
MASK = [[True, True], [False, True]]


def inputs(objective, reference=None) -> LossInputs:
    old = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]])
    logprobs = (old + torch.tensor(RATIOS).log()).requires_grad_()
    weights = objective.sequence_weights(torch.tensor([2, 1]), total_tokens=3, total_sequences=2)
    return LossInputs(logprobs, old, torch.tensor(ADVANTAGES), torch.tensor(MASK), weights, reference)


def test_grpo_is_the_mean_over_sequences_of_the_mean_over_tokens():
    # Sequence 1: min(1.5, 1.2) and min(0.5, 0.8) at A = 1; sequence 2: min(-0.5, -0.8) at A = -1.
    output = GRPO(0.2, 0.2)(inputs(GRPO()))
    assert output.loss.item() == pytest.approx(-((1.2 + 0.5) / 2 + -0.8) / 2)
    assert output.clipped_sum.item() == 2  # 1.5 above at A > 0, 0.5 below at A < 0
    assert output.ratio_deviation_max.item() == pytest.approx(0.5)


def test_dapo_is_the_mean_over_tokens_with_clip_higher():
    output = DAPO(0.2, 0.28)(inputs(DAPO()))
    assert output.loss.item() == pytest.approx(-(1.28 + 0.5 - 0.8) / 3)


@pytest.mark.parametrize("objective", [GRPO(0.1, 0.3), DAPO(0.1, 0.3)])
def test_good_tokens_are_clipped_from_above_and_bad_ones_from_below(objective):
    # Token by token: in the sum over the batch, exchanged bounds would cancel.
    losses, clipped, ratios = objective.token_losses(inputs(objective))
    torch.testing.assert_close(losses, torch.tensor([[-1.3, -0.5], [1.0, 0.9]]))
    torch.testing.assert_close(ratios, torch.tensor(RATIOS))
    assert clipped.tolist() == [[True, False], [False, True]]


def test_dr_grpo_divides_by_a_constant():
    objective = DrGRPO(normaliser=10)
    assert objective(inputs(objective)).loss.item() == pytest.approx(-(1.2 + 0.5 - 0.8) / (10 * 2))


def test_gspo_has_one_ratio_a_sequence():
    objective = GSPO(0.2, 0.2)
    first = math.sqrt(1.5 * 0.5)  # geometric mean, inside the range
    output = objective(inputs(objective))
    assert output.loss.item() == pytest.approx(-(first - 0.8) / 2, rel=1e-6)
    assert output.clipped_sum.item() == 1


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    objective = CISPO(clip_low=1.0, clip_high=0.28)
    batch = inputs(objective)
    objective(batch).loss.backward()
    assert batch.logprobs_BS.grad is not None
    expected = torch.tensor([[-1.28 / 3, -0.5 / 3], [0.0, 0.5 / 3]])
    torch.testing.assert_close(batch.logprobs_BS.grad, expected)


def test_clipping_stops_the_gradient_where_it_says():
    batch = inputs(GRPO())
    GRPO(0.2, 0.2)(batch).loss.backward()
    assert (batch.logprobs_BS.grad != 0).tolist() == [[False, True], [False, False]]


def test_k3_is_exact_and_never_negative():
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    expected = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]
    torch.testing.assert_close(k3_divergence(policy, reference), torch.tensor(expected))
    assert (k3_divergence(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_kl_penalty_enters_with_beta_and_the_same_weights():
    plain = DAPO()(inputs(DAPO())).loss
    reference = inputs(DAPO()).logprobs_BS.detach() + math.log(2)
    output = DAPO(beta=0.5)(inputs(DAPO(), reference))
    assert output.loss.item() - plain.item() == pytest.approx(0.5 * (2 - math.log(2) - 1), rel=1e-5)
    assert output.kl_sum.item() == pytest.approx(3 * (1 - math.log(2)), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: GRPO(clip_low=-0.1), lambda: DAPO(beta=-1), lambda: DrGRPO(normaliser=0)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
