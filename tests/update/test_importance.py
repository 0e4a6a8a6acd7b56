"""Importance weights and the mismatch guard against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.importance import (
    GeometricMasked,
    IcePop,
    NoCorrection,
    SequenceMasked,
    SequenceTruncated,
    TokenTruncated,
)
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.mismatch import Mismatch, MismatchBound, MismatchGuard
from rpo_lightning.update.objectives import DAPO, DPPO, GRPO
from tests.conftest import make_module
from tests.policy.prefix_sharing.test_logprobs import ALGEBRA, groups, settings

# Two sequences. The first token of the second one was not sampled: it is a prefix in the loss scope.
DIFFERENCE = torch.tensor([[math.log(3.0), math.log(0.5), 0.0], [0.0, math.log(2.0), math.log(2.0)]])
SAMPLED = torch.tensor([[True, True, True], [False, True, True]])


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (NoCorrection(), [[1, 1, 1], [1, 1, 1]]),
        (TokenTruncated(2.5), [[2.5, 0.5, 1], [1, 2, 2]]),
        (SequenceTruncated(3.0), [[1.5, 1.5, 1.5], [1, 3, 3]]),
        (SequenceMasked(3.0), [[1.5, 1.5, 1.5], [0, 0, 0]]),
        (IcePop(0.5, 2.5), [[0, 0.5, 1], [1, 2, 2]]),
        (IcePop(0.6, 3.5), [[3, 0, 1], [1, 2, 2]]),
        (IcePop(0.0, math.inf), [[3, 0.5, 1], [1, 2, 2]]),
        # Geometric means 1.5^(1/3) = 1.14 of three tokens, and 2 of the two that were sampled.
        (GeometricMasked(0.9, 1.2), [[1, 1, 1], [0, 0, 0]]),
        (GeometricMasked(0.9, 1.7), [[1, 1, 1], [0, 0, 0]]),
        (GeometricMasked(0.9, 1.1), [[0, 0, 0], [0, 0, 0]]),
        (GeometricMasked(0.9, 2.1), [[1, 1, 1], [1, 1, 1]]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_corrections_weigh_tokens_as_their_formula_says(correction, expected):
    torch.testing.assert_close(correction.weights(DIFFERENCE, SAMPLED), torch.tensor(expected, dtype=torch.float32))


def test_a_geometric_mean_that_is_too_low_is_masked_too():
    weights = GeometricMasked(0.9, 1.5).weights(torch.tensor([[-0.2, -0.1], [-0.1, 0.0]]), torch.ones(2, 2) > 0)
    assert weights.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenTruncated(0.5), r"TokenTruncated\.cap must be at least 1, got 0\.5"),
        (lambda: IcePop(1.1, 2.0), r"IcePop needs 0 <= lower <= 1 <= upper, got lower=1\.1 and upper=2\.0"),
        (lambda: GeometricMasked(0.5, 0.9), "GeometricMasked needs 0 <= lower <= 1 <= upper"),
    ],
)
def test_bounds_that_leave_out_one_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_an_objective_with_the_engines_ratio_refuses_a_correction_and_needs_none():
    assert isinstance(make_module(objective=DPPO())._importance_correction, NoCorrection)
    assert isinstance(make_module()._importance_correction, TokenTruncated)
    with pytest.raises(ConfigurationError, match="importance_correction=IcePop they would count twice"):
        make_module(objective=DPPO(), importance_correction=IcePop())


def with_engine_logprobs(policy, shift: float):
    """The groups with log-probs of an engine that differs from the trainer by ``shift`` nats a token."""
    batch = groups()
    PolicyLoss(policy, None, DAPO(), settings(), pad_id=0).store_old_logprobs(batch)
    for group in batch:
        group.completions = [
            type(c)(c.token_ids, tuple(x - shift for x in old), c.finished)
            for c, old in zip(group.completions, group.old_logprobs, strict=True)
        ]
        group.old_logprobs = None
    return batch


def backward(policy, batch, correction, objective=None, **changes):
    policy.zero_grad()
    # GRPO's mean over each sequence: in a mean over all tokens, the terms of the members' prefixes would cancel.
    loss = PolicyLoss(
        policy, None, objective or GRPO(), settings(**changes), pad_id=0, importance_correction=correction
    )
    metrics = loss.backward(batch, group_advantages([g.rewards for g in batch]), lambda x, _: x.backward())
    return {n: p.grad.clone() for n, p in policy.named_parameters()}, metrics


@pytest.mark.parametrize("scope", ["suffix", "response"])
def test_the_gradient_is_that_of_the_weighted_loss(policy, scope):
    policy = policy.double()
    batch = with_engine_logprobs(policy, shift=math.log(1.5))
    plain, _ = backward(policy, batch, NoCorrection(), loss_scope=scope)
    weighted, metrics = backward(policy, batch, TokenTruncated(2.0), loss_scope=scope)
    capped, _ = backward(policy, batch, TokenTruncated(1.2), loss_scope=scope)
    if scope == "suffix":  # every loss token was sampled, so all weigh the same
        for name, gradient in plain.items():
            torch.testing.assert_close(weighted[name], 1.5 * gradient, atol=ALGEBRA, rtol=0)
            torch.testing.assert_close(capped[name], 1.2 * gradient, atol=ALGEBRA, rtol=0)
    else:  # sampled tokens weigh 1.5 and 1.2, the prefix weighs 1
        for name, gradient in plain.items():
            of_sampled = (weighted[name] - capped[name]) / 0.3
            torch.testing.assert_close(weighted[name], gradient + 0.5 * of_sampled, atol=10 * ALGEBRA, rtol=0)
        assert any((weighted[n] - 1.5 * g).abs().max() > 1e-4 for n, g in plain.items())
    assert metrics["mismatch/logprob_mean"] == pytest.approx(math.log(1.5), abs=1e-6)
    assert metrics["mismatch/ratio_mean"] == pytest.approx(1.5, abs=1e-5)


def test_dppo_compares_with_the_engine_and_counts_it_once(policy):
    policy = policy.double()
    batch = with_engine_logprobs(policy, shift=math.log(1.5))
    plain, _ = backward(policy, batch, NoCorrection(), DAPO())
    free, metrics = backward(policy, batch, NoCorrection(), DPPO(math.inf))
    for name, gradient in plain.items():
        torch.testing.assert_close(free[name], 1.5 * gradient, atol=ALGEBRA, rtol=0)
    assert metrics["loss/ratio_deviation_max"] == pytest.approx(0.5, abs=1e-6)
    _, metrics = backward(policy, batch, NoCorrection(), DPPO(1e-9))
    # The policy is above the engine at every token: those of good responses are masked, others move back.
    good = [len(c.token_ids) for g in batch for c, r in zip(g.completions, g.rewards, strict=True) if r > 0.5]
    assert metrics["loss/clip_share"] == pytest.approx(sum(good) / metrics["loss/tokens"])


def test_the_share_of_masked_tokens_is_logged(policy):
    batch = with_engine_logprobs(policy, shift=math.log(1.5))
    for correction, share in ((IcePop(), 0.0), (IcePop(0.5, 1.4), 1.0), (GeometricMasked(), 1.0)):
        gradient, metrics = backward(policy, batch, correction)
        assert metrics["mismatch/masked_share"] == share
        assert any(g.abs().max() > 0 for g in gradient.values()) == (share == 0.0)


def test_without_comparable_log_probs_there_are_no_weights_and_no_statistics(policy):
    _, metrics = backward(policy, with_engine_logprobs(policy, 1.0), None)
    assert not [name for name in metrics if name.startswith("mismatch/")]


def test_mismatch_statistics_are_those_of_the_sampled_tokens():
    mismatch = Mismatch()
    for part in (slice(0, 1), slice(1, 2)):
        mismatch.add(DIFFERENCE[part], SAMPLED[part], IcePop(0.6, 3.5).weights(DIFFERENCE[part], SAMPLED[part]))
    found = mismatch.metrics()
    ratios = torch.tensor([3.0, 0.5, 1.0, 2.0, 2.0])
    assert found["mismatch/logprob_mean"] == pytest.approx(ratios.log().abs().mean().item())
    assert found["mismatch/logprob_max"] == pytest.approx(math.log(3.0))
    assert found["mismatch/ratio_mean"] == pytest.approx(1.7)
    assert found["mismatch/ratio_std"] == pytest.approx(ratios.std(correction=0).item())
    assert found["mismatch/masked_share"] == pytest.approx(1 / 5)
    assert (found["mismatch/ratio_min"], found["mismatch/ratio_max"]) == pytest.approx((0.5, 3.0))


def test_the_guard_stops_at_a_jump_and_at_the_bound_and_survives_a_checkpoint():
    guard = MismatchGuard(MismatchBound(largest=0.2, jump=10, smallest=1e-4))
    for mean in (0.01, 0.012, 0.011, 0.09):  # noise, and less than ten times the median
        guard.check(mean, 0)
    restored = MismatchGuard(MismatchBound())
    restored.load_state_dict(guard.state_dict())
    for bad in (0.12, 0.5):
        with pytest.raises(EngineError, match="stale or incomplete"):
            restored.check(bad, 7)
    restored.check(0.12, 7, is_usual=False)  # of a response or so
    with pytest.raises(EngineError, match="stale or incomplete"):
        restored.check(0.5, 7, is_usual=False)
    restored.check(0.09, 8)
    fresh = MismatchGuard(MismatchBound())
    fresh.check(1e-6, 0)
    fresh.check(9e-5, 1)  # many times the median, but below the smallest mean that counts
    with pytest.raises(EngineError, match=r"update 2: .*0\.0015 nats"):
        fresh.check(1.5e-3, 2)
