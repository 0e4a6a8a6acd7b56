"""Prefixes are cut from the cache, scored groups refresh it, and token ids and their updates survive both."""

from __future__ import annotations

import numpy as np
import pytest

from rpo_lightning.cache.budgets import CutPlusSlackBudget, FullBudget
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, UniformCut
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.refresh import CorrectMemberRefresh, EpsilonGreedyRefresh
from rpo_lightning.core.types import Prompt
from tests.conftest import make_group

PROMPT = Prompt("q", "question", (1, 5, 6), "0")


class KeepTokens(CutStrategy):
    """A prefix of a fixed number of tokens. Records the outcomes."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.outcomes = []

    def prefix_length(self, entry, response, rng):
        return self.tokens

    def observe(self, entry, outcome):
        self.outcomes.append(outcome)
        entry.state["visits_seen"] = entry.state.get("visits_seen", 0) + 1


def prefixes(cut=None, **settings) -> CachedPrefixes:
    defaults = {
        "cache": ExperienceCache("tokenizer"),
        "cut": cut or KeepTokens(2),
        "budget": FullBudget(),
        "refresh": EpsilonGreedyRefresh(1.0),
        "response_limit": 10,
    }
    return CachedPrefixes(**{**defaults, **settings})


def test_the_first_visit_takes_the_full_path_and_the_next_continues_its_best_response():
    served = prefixes()
    first = served.request(PROMPT)
    assert (first.prefix_ids, first.max_new_tokens) == ((), 10)
    served.record(make_group([0.0, 1.0], [(7, 8, 9, 2), (11, 12, 13, 2)]))
    second = served.request(PROMPT)
    assert (second.prefix_ids, second.cut, second.max_new_tokens) == ((11, 12), 2, 8)


def test_the_strategy_is_told_the_outcome_and_its_state_lives_in_the_entry():
    served = prefixes()
    served.record(make_group([0.0, 1.0], [(7, 8, 2), (11, 2)], prefix_ids=(3, 4), cached_length=6))
    (outcome,) = served.cut.outcomes
    assert (outcome.prefix_length, outcome.cut) == (2, 4)
    assert (outcome.rewards, outcome.correct, outcome.lengths) == ([0.0, 1.0], [False, True], [5, 4])
    assert served.cache.entry("q").state == {"visits_seen": 1}


def test_at_least_one_token_is_regenerated():
    served = prefixes(KeepTokens(100))
    served.record(make_group([1.0, 1.0], [(7, 8, 2)] * 2))
    assert served.request(PROMPT).prefix_ids == (7, 8)


def test_a_cached_response_over_the_limit_leaves_room_for_a_token():
    served = prefixes(KeepTokens(100), response_limit=2)
    served.record(make_group([1.0, 1.0], [(7, 8, 9, 2)] * 2))
    request = served.request(PROMPT)
    assert (request.prefix_ids, request.max_new_tokens) == ((7,), 1)


def test_the_paper_like_budget_is_what_was_cut_plus_slack():
    served = prefixes(budget=CutPlusSlackBudget(slack=1), response_limit=100)
    served.record(make_group([1.0, 1.0], [(7, 8, 9, 2)] * 2))
    assert served.request(PROMPT).max_new_tokens == 3


def test_a_failed_group_restarts_the_question_only_if_asked():
    for on_failure, expected in (("keep", (7, 8)), ("restart", ())):
        served = prefixes(on_failure=on_failure)
        served.record(make_group([0.0, 0.0], [(7, 8, 2)] * 2))
        assert served.request(PROMPT).prefix_ids == expected
        served.record(make_group([0.0, 1.0], [(7, 8, 2)] * 2))
        assert served.request(PROMPT).prefix_ids == (7, 8)


def test_unfinished_responses_stay_out_of_the_cache_unless_asked_for():
    group = make_group([1.0, 0.0], [(7, 8, 9), (11, 12, 2)], finished=[False, True])
    served = prefixes()
    served.record(group)
    assert served.cache.entry("q").response.token_ids.tolist() == [11, 12, 2]
    served = prefixes(keep_unfinished=True)
    served.record(group)
    assert served.cache.entry("q").response.token_ids.tolist() == [7, 8, 9]


def test_an_anchor_stays_when_a_later_group_fails():
    served = prefixes(refresh=CorrectMemberRefresh())
    served.record(make_group([1.0, 0.0], [(7, 8, 2), (9, 9, 2)]))
    served.record(make_group([0.0, 0.0], [(5, 5, 2)] * 2))
    assert served.cache.entry("q").response.token_ids.tolist() == [7, 8, 2]


def test_every_token_knows_the_update_it_was_generated_at():
    served = prefixes(KeepTokens(2))
    served.record(make_group([1.0, 1.0], [(7, 8, 9, 2)] * 2, step=0))
    request = served.request(PROMPT)
    group = make_group([1.0, 1.0], [(11, 12, 2)] * 2, step=5)
    group.request = request
    served.record(group)
    response = served.cache.entry("q").response
    assert response.token_ids.tolist() == [7, 8, 11, 12, 2]
    assert response.spans == ((0, 2), (5, 3))
    statistics = served.cache.statistics(step=6)
    assert statistics["age"] == 1.0
    assert statistics["initial_token_share"] == pytest.approx(2 / 5)


def test_a_visit_resolves_the_same_way_whatever_came_before_it():
    def request_after(others: int):
        served = prefixes(UniformCut(8), response_limit=50)
        for i in range(others):
            served.record(make_group([0.0, 1.0], [tuple(range(3, 13)), tuple(range(13, 23))], uid=f"other{i}"))
        served.record(make_group([0.0, 1.0], [tuple(range(3, 13)), tuple(range(13, 23))]))
        return served.request(PROMPT)

    assert request_after(0) == request_after(7)


def test_ids_pass_through_the_cache_unchanged():
    ids = tuple(np.random.default_rng(0).integers(0, 2**31 - 1, size=9).tolist())
    served = prefixes(KeepTokens(8), response_limit=100)
    served.record(make_group([1.0, 0.0], [ids, (1, 2)]))
    assert served.request(PROMPT).prefix_ids == ids[:8]
