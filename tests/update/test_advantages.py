"""Advantages equal hand-computed numbers."""

from __future__ import annotations

import logging
import math
from statistics import mean, pstdev, stdev

import pytest

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.rewards import AccuracyReward, FormatReward
from rpo_lightning.update.advantages import (
    GDPO,
    RLOO,
    AdvantageEstimator,
    BatchScaled,
    GroupScaled,
    MaxRL,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    Unscaled,
)
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from rpo_lightning.update.objectives import DrGRPO
from tests.conftest import make_group, make_module

REWARDS = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0]]
ALL = [1.0, 0.0, 0.0, 1.0, 3.0, 1.0]


def advantages(estimator: AdvantageEstimator, rewards=REWARDS, terms=None, weights=None) -> list[list[float]]:
    groups = [make_group(r) for r in rewards]
    for group, of_group in zip(groups, terms or [], strict=bool(terms)):
        group.reward_terms = of_group
    return [a.tolist() for a in estimator.advantages(groups, weights or {}, Ranks())]


def test_group_scale_divides_by_the_groups_own_deviation():
    first, second = advantages(GroupScaled())
    # Sample deviations: sqrt(4 * 0.25 / 3) and sqrt(2).
    assert first == pytest.approx([0.5 / (1 / 3) ** 0.5 * sign for sign in (1, -1, -1, 1)], abs=1e-5)
    assert second == pytest.approx([1 / 2**0.5, -1 / 2**0.5], abs=1e-5)


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    first, second = advantages(BatchScaled())
    assert first[0] == pytest.approx(0.5 / stdev(ALL), rel=1e-4)
    assert second[0] == pytest.approx(1.0 / stdev(ALL), rel=1e-4)


def test_no_scale_only_centres():
    assert advantages(Unscaled())[1] == [1.0, -1.0]


def test_rloo_subtracts_the_mean_of_the_other_members():
    first, second = advantages(RLOO())
    # The others' means are 1/3 and 2/3 in the first group.
    assert first == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert second == [2.0, -2.0]


def test_reinforce_plus_plus_normalises_by_the_batch_alone():
    first, second = advantages(ReinforcePlusPlus())
    expected = [(r - 1.0) / stdev(ALL) for r in ALL]  # the mean of all is 1
    assert first + second == pytest.approx(expected, abs=1e-5)
    right, wrong = advantages(ReinforcePlusPlus(), [[1.0, 1.0], [0.0, 0.0]])
    assert right == pytest.approx([math.sqrt(3) / 2] * 2, abs=1e-5)
    assert wrong == pytest.approx([-math.sqrt(3) / 2] * 2, abs=1e-5)


def test_reinforce_plus_plus_with_baseline_divides_by_the_deviation_of_centred_rewards():
    first, second = advantages(ReinforcePlusPlusBaseline())
    centred = [0.5, -0.5, -0.5, 0.5, 1.0, -1.0]
    deviation = math.sqrt(3 / 5)  # the squares' sum is 3, of 6 responses
    assert first + second == pytest.approx([c / deviation for c in centred], abs=1e-5)


def test_max_rl_divides_by_the_mean_reward():
    rare, often, none = advantages(MaxRL(), [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0]])
    assert rare == [3.0, -1.0, -1.0, -1.0]
    assert often == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1.0])
    assert none == [0.0, 0.0]


def test_max_rl_weighs_the_scores_of_right_responses_as_its_paper_does():
    """Σ A_i S_i / G is the mean score of the right responses minus the mean score of all."""
    rewards, scores = [1.0, 0.0, 1.0, 0.0, 0.0], [0.3, -1.2, 2.0, 0.7, -0.1]
    (found,) = advantages(MaxRL(), [rewards])
    right = [s for s, r in zip(scores, rewards, strict=True) if r]
    assert mean(a * s for a, s in zip(found, scores, strict=True)) == pytest.approx(mean(right) - mean(scores))


def test_max_rl_refuses_rewards_that_are_no_rates():
    with pytest.raises(UpdateError, match=r"needs rewards of at least 0: question q has -0\.5"):
        advantages(MaxRL(), [[1.0, -0.5]])


def test_gdpo_normalises_each_term_then_the_sum_over_the_batch():
    terms = [
        {"accuracy": [1.0, 0.0, 0.0], "format": [10.0, 0.0, 5.0]},
        {"accuracy": [1.0, 1.0], "format": [0.0, 30.0]},
    ]
    # Within the groups: accuracy (2, -1, -1)/√3 and (0, 0), format (1, -1, 0) and (-1, 1)/√2; format weighs 0.5.
    root = math.sqrt(3)
    sums = [2 / root + 0.5, -1 / root - 0.5, -1 / root, -0.5 / math.sqrt(2), 0.5 / math.sqrt(2)]
    deviation = pstdev(sums) * math.sqrt(5 / 4)
    first, second = advantages(GDPO(), [[0.0] * 3, [0.0] * 2], terms, {"accuracy": 1.0, "format": 0.5})
    assert first + second == pytest.approx([s / deviation for s in sums], abs=1e-5)


def test_gdpo_keeps_rewards_apart_whose_sums_are_equal():
    terms = [{"a": [1.0, 0.0, 0.0, 0.0], "b": [0.0, 1.0, 1.0, 0.0]}]
    (found,) = advantages(GDPO(), [[1.0, 1.0, 1.0, 0.0]], terms, {"a": 1.0, "b": 1.0})
    assert found[0] > found[1] > found[3]  # the rarer one counts more
    assert len({round(a, 6) for a in advantages(GroupScaled(), [[1.0, 1.0, 1.0, 0.0]])[0]}) == 2


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_gdpo_leaves_a_term_out_where_it_is_missing(missing):
    terms = [{"a": [1.0, 0.0, missing], "b": [0.0, 0.0, 3.0]}]
    (found,) = advantages(GDPO(), [[0.0] * 3], terms, {"a": 1.0, "b": 1.0})
    sums = [1 / math.sqrt(2) - 1 / math.sqrt(3), -1 / math.sqrt(2) - 1 / math.sqrt(3), 2 / math.sqrt(3)]
    assert found == pytest.approx([s / stdev(sums) for s in sums], abs=1e-5)


def test_gdpo_names_the_term_that_a_group_lacks():
    with pytest.raises(UpdateError, match="needs the values of reward 'format', and the group of question q has none"):
        advantages(GDPO(), [[1.0, 0.0]], [{"accuracy": [1.0, 0.0]}], {"accuracy": 1.0, "format": 1.0})


@pytest.mark.parametrize(
    "estimator", [GroupScaled(), BatchScaled(), Unscaled(), RLOO(), ReinforcePlusPlusBaseline(), MaxRL()]
)
def test_a_group_without_variance_gets_zeros(estimator):
    assert not estimator.learns_from_equal_rewards
    assert advantages(estimator, [[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])[0] == [0.0, 0.0, 0.0]


def test_dr_grpo_has_unscaled_advantages_unless_others_are_asked_for(caplog):
    assert isinstance(make_module(objective=DrGRPO(8))._advantages, Unscaled)
    assert isinstance(make_module()._advantages, GroupScaled)
    assert not caplog.records
    make_module(objective=DrGRPO(8), advantages=GroupScaled())
    assert "DrGRPO is published with model.update.advantages=Unscaled; with GroupScaled it is another" in caplog.text


def test_settings_that_do_not_fit_are_told_in_a_line(caplog):
    with caplog.at_level(logging.WARNING):
        make_module(advantages=GDPO(), rewards=[AccuracyReward(), FormatReward(weight=0.5)])
        assert not caplog.records
        make_module(advantages=GDPO())
        make_module(advantages=ReinforcePlusPlus(), dynamic_sampling=DynamicSampling())
    first, second = [r.getMessage() for r in caplog.records]
    assert "model.rewards has one" in first
    assert "drops groups of equal rewards, from which model.update.advantages=ReinforcePlusPlus may learn" in second
