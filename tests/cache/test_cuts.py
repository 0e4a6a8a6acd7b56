"""Cuts, suffix budgets and refresh rules do what equations 3, 4 and 10 say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rpo_lightning.cache.budgets import CutPlusSlackBudget, FullBudget
from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, FractionOfShortestCut, GroupOutcome, UniformCut
from rpo_lightning.cache.refresh import CorrectMemberRefresh, EpsilonGreedyRefresh
from rpo_lightning.core.errors import ConfigurationError
from tests.conftest import make_group


def entry(length: int, correct: bool = True) -> CacheEntry:
    response = CachedResponse(np.arange(length, dtype=np.int32), 1.0, correct, True, ((0, length),))
    cache = ExperienceCache("tokenizer")
    cache.remember("q", response)
    return cache.entry("q")


def prefix_lengths(cut, cached: CacheEntry, draws: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([cut.prefix_length(cached, cached.response, rng) for _ in range(draws)])


def test_uniform_cut_drops_zero_to_l_tokens_with_equal_probability():
    counts = Counter((100 - prefix_lengths(UniformCut(4), entry(100))).tolist())
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(abs(n / 4000 - 0.2) for n in counts.values()) < 0.03


def test_a_cut_longer_than_the_response_leaves_no_prefix():
    values = prefix_lengths(UniformCut(1000), entry(10))
    assert values.min() == 0
    assert values.max() <= 10


def test_fraction_cut_follows_the_shortest_response_of_the_last_group():
    cut, cached = FractionOfShortestCut(0.5), entry(100)
    assert (100 - prefix_lengths(cut, cached)).max() == 50  # no group yet: the cached response's own length
    cut.observe(cached, GroupOutcome(60, 40, [1, 0], [True, False], [90, 20]))
    assert cached.state == {"shortest_length": 20}
    dropped = 100 - prefix_lengths(cut, cached)
    assert (dropped.min(), dropped.max()) == (0, 10)


def test_anchored_cut_keeps_a_share_of_a_correct_response_only():
    values = prefix_lengths(AnchoredCut(0.25, 0.75), entry(100))
    assert values.min() >= 25
    assert values.max() <= 75
    assert abs(values.mean() - 50) < 1.5
    assert prefix_lengths(AnchoredCut(0.25, 0.75), entry(100, correct=False)).max() == 0


def test_budgets():
    assert FullBudget().tokens(prefix_length=60, cut=40, response_limit=100) == 40
    assert CutPlusSlackBudget(slack=5).tokens(prefix_length=60, cut=40, response_limit=1000) == 45


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformCut(0),
        lambda: FractionOfShortestCut(0.0),
        lambda: AnchoredCut(0.6, 0.5),
        lambda: AnchoredCut(0.5, 1.0),
        lambda: EpsilonGreedyRefresh(1.5),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_a_budget_that_may_be_zero_is_refused():
    with pytest.raises(ConfigurationError, match="suffix budget of 0"):
        CutPlusSlackBudget(slack=0)


def test_epsilon_greedy_takes_the_best_with_probability_epsilon_and_any_other_otherwise():
    group, rng = make_group([0.0, 1.0, 0.5, 0.2]), np.random.default_rng(0)
    counts = Counter(EpsilonGreedyRefresh(0.5).choose(group, [0, 1, 2, 3], rng)[0] for _ in range(6000))
    assert abs(counts[1] / 6000 - 0.5) < 0.03
    for other in (0, 2, 3):  # including the last member
        assert abs(counts[other] / 6000 - 1 / 6) < 0.03


def test_epsilon_one_is_always_the_best_and_ties_are_broken_at_random():
    group, rng = make_group([0.0, 1.0, 1.0]), np.random.default_rng(0)
    assert {EpsilonGreedyRefresh(1.0).choose(group, [0, 1, 2], rng)[0] for _ in range(50)} == {1, 2}
    assert EpsilonGreedyRefresh(0.0).choose(group, [1], rng) == [1]
    assert EpsilonGreedyRefresh(0.5).choose(group, [], rng) == []


def test_correct_member_refresh_never_takes_a_wrong_one():
    rng = np.random.default_rng(0)
    assert {CorrectMemberRefresh().choose(make_group([1.0, 0.0, 1.0]), [0, 1, 2], rng)[0] for _ in range(50)} == {0, 2}
    assert CorrectMemberRefresh().choose(make_group([0.0, 0.0]), [0, 1], rng) == []
