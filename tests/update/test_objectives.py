"""Objectives equal hand-computed numbers, and clip and penalise where they should."""

from __future__ import annotations

import math

import pytest
import torch

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.importance import IcePop, NoCorrection
from rpo_lightning.update.objectives import (
    CISPO,
    DAPO,
    DPPO,
    DPPOKL,
    GRPO,
    GSPO,
    SAPO,
    DrGRPO,
    GSPOToken,
    LossInputs,
    Objective,
)
from rpo_lightning.update.objectives.base import k3_divergence

# Two sequences with two and one loss tokens. The first has a positive advantage, the second a negative one.
RATIOS = [[1.5, 0.5], [1.0, 0.5]]
ADVANTAGES = [1.0, -1.0]
MASK = [[True, True], [False, True]]
OLD = [[-1.0, -2.0], [-1.0, -3.0]]


def inputs(objective, reference=None, **changes) -> LossInputs:
    old = torch.tensor(OLD)
    given = {
        "logprobs_BS": (old + torch.tensor(RATIOS).log()).requires_grad_(),
        "old_logprobs_BS": old,
        "engine_logprobs_BS": old,
        "advantages_BS": torch.tensor(ADVANTAGES)[:, None].expand(2, 2),
        "mask_BS": torch.tensor(MASK),
        "weights_B": objective.sequence_weights(torch.tensor([2, 1]), total_tokens=3, total_sequences=2),
        "entropy_BS": torch.tensor([[0.5, 1.5], [9.0, 2.0]], requires_grad=True),
        "reference_logprobs_BS": reference,
    }
    return LossInputs(**{**given, **changes})


def gradient(objective: Objective, **changes) -> torch.Tensor:
    """The gradient by the log-probs."""
    batch = inputs(objective, **changes)
    objective(batch).loss.backward()
    assert batch.logprobs_BS.grad is not None
    return batch.logprobs_BS.grad


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
    expected = torch.tensor([[-1.28 / 3, -0.5 / 3], [0.0, 0.5 / 3]])
    torch.testing.assert_close(gradient(CISPO(clip_low=1.0, clip_high=0.28)), expected)


def test_clipping_stops_the_gradient_where_it_says():
    assert (gradient(GRPO(0.2, 0.2)) != 0).tolist() == [[False, True], [False, False]]


def test_sapo_gates_the_ratio_with_a_temperature_for_each_sign():
    objective = SAPO(tau_pos=1.0, tau_neg=2.0)

    def p(tau, ratio):
        return 1 / (1 + math.exp(-tau * (ratio - 1)))

    # 4/τ p(r) · A at ratios 1.5 and 0.5 with A = 1, and 0.5 with A = -1; means over tokens, then over sequences.
    expected = -((4 * p(1, 1.5) + 4 * p(1, 0.5)) / 2 - 2 * p(2, 0.5)) / 2
    assert objective(inputs(objective)).loss.item() == pytest.approx(expected, rel=1e-6)
    weights = [[4 * p(t, r) * (1 - p(t, r)) * r for r in row] for t, row in zip((1, 2), RATIOS, strict=True)]
    slopes = torch.tensor([[-weights[0][0] / 4, -weights[0][1] / 4], [0.0, weights[1][1] / 2]])
    torch.testing.assert_close(gradient(objective), slopes)
    assert objective(inputs(objective)).clipped_sum.item() == 0


def on_policy(objective: Objective, **changes) -> torch.Tensor:
    """The gradient where the policy has not moved."""
    return gradient(objective, **{"logprobs_BS": torch.tensor(OLD, requires_grad=True), **changes})


@pytest.mark.parametrize("objective", [SAPO(), SAPO(0.3, 3.0), GSPOToken(), GSPO()])
def test_at_a_ratio_of_one_the_gradient_is_the_plain_one(objective):
    # -A / (tokens of the sequence · sequences)
    torch.testing.assert_close(on_policy(objective), torch.tensor([[-0.25, -0.25], [0.0, 0.5]]))


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.9, 0.9)], ids=["clipped", "free"])
def test_gspo_token_is_gspo_where_the_tokens_of_a_sequence_have_one_advantage(clip):
    sequence, token = GSPO(*clip), GSPOToken(*clip)
    assert token(inputs(token)).loss.item() == pytest.approx(sequence(inputs(sequence)).loss.item())
    torch.testing.assert_close(gradient(token), gradient(sequence))
    assert gradient(token).abs().sum() > 0


def test_gspo_token_gives_each_token_the_gradient_of_its_own_advantage_and_weight():
    advantages, weights = torch.tensor([[1.0, 3.0], [0.0, -1.0]]), torch.tensor([[0.5, 2.0], [1.0, 1.0]])
    ratio = math.sqrt(1.5 * 0.5)
    changes = {"advantages_BS": advantages, "importance_BS": weights}
    token, sequence = (gradient(o, **changes) for o in (GSPOToken(0.9, 0.9), GSPO(0.9, 0.9)))
    # Σ w A = 6.5 in the first sequence: GSPO gives each token half of it.
    torch.testing.assert_close(token[0], torch.tensor([-0.5 * ratio / 4, -6.0 * ratio / 4]))
    torch.testing.assert_close(sequence[0], torch.tensor([-3.25 * ratio / 4] * 2))


def probabilities(now, engine, advantages) -> dict[str, torch.Tensor]:
    """Inputs of one sequence with given probabilities of its tokens."""
    old = torch.tensor([[0.5] * len(now)]).log()  # the trainer's own are not looked at
    return {
        "logprobs_BS": torch.tensor([now]).log().requires_grad_(),
        "old_logprobs_BS": old,
        "engine_logprobs_BS": torch.tensor([engine]).log(),
        "advantages_BS": torch.tensor([advantages]),
        "mask_BS": torch.ones(1, len(now), dtype=torch.bool),
        "weights_B": torch.tensor([1.0], dtype=torch.float64),
        "entropy_BS": torch.zeros(1, len(now)),
    }


@pytest.mark.parametrize("objective", [DPPO(0.15), DPPOKL(0.05)])
def test_dppo_masks_tokens_that_would_move_further_away_than_the_threshold(objective):
    # A rare token of ten times the probability, a common one that moved far up, down, and both back towards the engine.
    now, engine = [0.01, 0.7, 0.3, 0.7, 0.3], [0.001, 0.4, 0.7, 0.4, 0.7]
    batch = inputs(objective, **probabilities(now, engine, [1.0, 1.0, -1.0, -1.0, 1.0]))
    losses, masked, ratio = objective.token_losses(batch)
    assert masked.tolist() == [[False, True, True, False, False]]
    torch.testing.assert_close(ratio, torch.tensor([[10.0, 1.75, 3 / 7, 1.75, 3 / 7]]))
    torch.testing.assert_close(losses, torch.tensor([[-10.0, 0.0, 0.0, 1.75, -3 / 7]]))
    losses.sum().backward()
    torch.testing.assert_close(batch.logprobs_BS.grad, torch.tensor([[-10.0, 0.0, 0.0, 1.75, -3 / 7]]))


def test_the_divergences_are_those_of_two_outcomes():
    now, engine = torch.tensor([0.7, 0.01, 1.0, 0.9]), torch.tensor([0.4, 0.001, 1.0, 1.0])
    assert DPPO().divergence(now.log(), engine.log()).tolist() == pytest.approx([0.3, 0.009, 0.0, 0.1], abs=1e-6)
    expected = [
        0.4 * math.log(0.4 / 0.7) + 0.6 * math.log(0.6 / 0.3),
        0.001 * math.log(0.001 / 0.01) + 0.999 * math.log(0.999 / 0.99),
        0.0,
        math.log(1 / 0.9),
    ]
    assert DPPOKL().divergence(now.log(), engine.log()).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", [DPPO(math.inf), DPPOKL(math.inf)])
def test_dppo_without_a_bound_is_the_ratio_times_the_advantage(objective):
    expected = torch.tensor([[-1.5 / 3, -0.5 / 3], [0.0, 0.5 / 3]])
    torch.testing.assert_close(gradient(objective), expected)


def test_icepop_without_bounds_weighs_as_the_engines_ratio_does():
    """The ratio to the engine is the ratio to the trainer's old policy times the importance weight."""
    engine = torch.tensor([[-1.2, -1.5], [-1.0, -2.6]])
    weights = IcePop(0.0, math.inf).weights(torch.tensor(OLD) - engine, torch.tensor(MASK))
    weighted = gradient(DAPO(1.0, 1e9), importance_BS=weights)
    torch.testing.assert_close(weighted, gradient(DPPO(math.inf), engine_logprobs_BS=engine))
    unweighted = gradient(DAPO(1.0, 1e9), importance_BS=NoCorrection().weights(weights, torch.tensor(MASK)))
    assert not torch.allclose(weighted, unweighted)


@pytest.mark.parametrize("objective", [GRPO(entropy_bonus=0.1), DAPO(entropy_bonus=0.1), SAPO(entropy_bonus=0.1)])
def test_an_entropy_bonus_enters_with_the_weights_of_the_policy_loss(objective):
    plain = type(objective)()
    batch = inputs(objective)
    output = objective(batch)
    # Entropies 0.5 and 1.5, and 2: means over tokens, then sequences, or over all tokens.
    mean = (0.5 + 1.5 + 2.0) / 3 if isinstance(objective, DAPO) else (1.0 + 2.0) / 2
    assert output.loss.item() == pytest.approx(plain(inputs(plain)).loss.item() - 0.1 * mean)
    assert output.policy_loss.item() == pytest.approx(plain(inputs(plain)).loss.item())
    output.loss.backward()
    weights = batch.weights_B[:, None] * batch.mask_BS
    torch.testing.assert_close(batch.entropy_BS.grad, (-0.1 * weights).float())
    untouched = inputs(plain)
    plain(untouched).loss.backward()
    assert untouched.entropy_BS.grad is None


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(clip_low=-0.1), "clip_low must be at least 0, got -0.1"),
        (lambda: DAPO(beta=-1), "beta must be at least 0, got -1"),
        (lambda: GSPOToken(entropy_bonus=-0.5), "entropy_bonus must be at least 0, got -0.5"),
        (lambda: CISPO(entropy_bonus=math.nan), "entropy_bonus must be at least 0, got nan"),
        (lambda: DrGRPO(normaliser=0), "normaliser must be at least 1"),
        (lambda: SAPO(tau_neg=0), r"SAPO.tau_neg must be above 0, got 1\.0 and 0"),
        (lambda: DPPOKL(threshold=0), "DPPOKL.threshold must be above 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
