"""Prefixes are cut from the cache, scored groups refresh it, and token ids and their updates survive both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rpo_lightning.cache.budgets import CutPlusSlackBudget, FullBudget
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, CutStrategy, UniformCut
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.refresh import CorrectMemberRefresh, EpsilonGreedyRefresh
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Prompt
from rpo_lightning.policy.tokenizer import tokens_that_match
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


def test_a_cut_moves_to_the_nearest_end_of_a_step():
    steps = StepEnds(np.isin(np.arange(20), [9]))  # a step ends after token 9
    ids = np.array([3, 4, 9, 5, 6, 7, 9, 8, 99], np.int32)  # after 3 and 7 tokens; 99 is not in the vocabulary
    assert [steps.nearest(ids, length) for length in (1, 3, 5, 6, 8)] == [3, 3, 3, 7, 7]
    assert steps.nearest(np.array([3, 4, 5], np.int32), 2) == 2
    assert steps.nearest(ids[:6], 6) == 3  # what lies beyond the limit is no place to cut
    served = prefixes(KeepTokens(5), steps=steps, response_limit=20)
    served.record(make_group([1.0, 1.0], [tuple(ids.tolist())] * 2))
    assert served.request(PROMPT).prefix_ids == (3, 4, 9)
    assert prefixes(KeepTokens(0), steps=steps, cache=served.cache).request(PROMPT).prefix_ids == ()


def test_tokens_that_end_a_step_are_looked_up_by_their_text(tokenizer):
    ends = tokens_that_match(tokenizer, "[=*]", "cache.step_end")
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert [text for text, is_end in zip(texts, ends, strict=True) if is_end] == sorted("=*", key=texts.index)
    with pytest.raises(ConfigurationError, match=r"cache\.step_end='\(' is no regular expression"):
        tokens_that_match(tokenizer, "(", "cache.step_end")
    with pytest.raises(ConfigurationError, match="matches no token of the policy's tokenizer"):
        tokens_that_match(tokenizer, "\n\n", "cache.step_end")


def test_a_share_of_the_visits_is_plain_whatever_is_cached():
    served = prefixes(KeepTokens(2))
    served.cut.plain_share = 0.25
    served.record(make_group([1.0, 1.0], [(7, 8, 9, 2)] * 2))
    plain = []
    for visit in range(400):
        served.cache.entry("q").visits = visit
        request = served.request(PROMPT)
        assert request == served.request(PROMPT)  # drawn from the visit, not from what was drawn before
        plain.append(not request.prefix_ids)
    assert abs(sum(plain) / 400 - 0.25) < 0.05
    with pytest.raises(ConfigurationError, match=r"cache\.cut\.plain_share must lie in \[0, 1\), got 1\.0"):
        AnchoredCut(plain_share=1.0)


def test_an_iteration_tells_what_its_visits_were_like():
    served = prefixes(KeepTokens(2))
    groups = [
        make_group([1.0, 0.0, 0.0, 0.0], uid="plain"),
        make_group([1.0, 1.0, 1.0, 1.0], uid="easy"),
        make_group([1.0, 0.0, 1.0, 1.0], prefix_ids=(3, 4, 5), cached_length=4, uid="late"),
        make_group([1.0, 0.0, 1.0, 1.0], prefix_ids=(3,), cached_length=4, uid="early"),
    ]
    visits = served.apply_iteration(served.update_from(group) for group in groups)
    assert visits == {"kept_share": 0.5, "unprefixed_success": 0.625}
    without = served.apply_iteration([served.update_from(groups[0])])
    assert without == pytest.approx({"kept_share": math.nan, "unprefixed_success": 0.25}, nan_ok=True)
