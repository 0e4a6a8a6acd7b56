"""A question keeps several responses: right and wrong, own ones and traces, each with its tokens, spans and age."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rpo_lightning.cache import (
    AnchorsRefresh,
    CachedResponse,
    CorrectMemberRefresh,
    CutStrategy,
    EpsilonGreedyRefresh,
    ExperienceCache,
    FullBudget,
    read_cache,
    write_cache,
)
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cli.cache.exchange import exported_rows
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Prompt
from tests.conftest import cache_contents, make_group

PROMPT = Prompt("q", "question", (1, 5, 6), "0")
SAVED = Path(__file__).parents[1] / "saved"


def response(*ids: int, correct: bool = True, step: int = 0) -> CachedResponse:
    return CachedResponse(np.array(ids, np.int32), float(correct), correct, True, ((step, len(ids)),))


class KeepTwoOfTheLast(CutStrategy):
    """Cut the last anchor, whatever it is."""

    def anchor(self, entry, rng):
        return entry.anchors[-1]

    def prefix_length(self, entry, response, rng):
        return 2


def served(refresh, cut=None, **settings) -> CachedPrefixes:
    cache = ExperienceCache("abc")
    return CachedPrefixes(cache, cut or KeepTwoOfTheLast(), FullBudget(), refresh, response_limit=20, **settings)


def tokens(cache: ExperienceCache, uid: str = "q") -> list[list[int]]:
    return [anchor.token_ids.tolist() for anchor in cache.entry(uid).anchors]


def several_anchors() -> ExperienceCache:
    cache = ExperienceCache("abc")
    cache.remember("both", response(1, 2, 3, step=4))
    cache.remember("both", response(4, 5, correct=False, step=2), slot=1)
    cache.remember("wrong only", response(6, correct=False), slot=2)
    cache.entry("both").state = {"level": -0.25}
    cache.entry("nothing").visits = 3
    cache.shared = {"mean": [0.1, 1 / 3]}
    return cache


def test_files_and_checkpoints_hold_all_anchors_and_what_all_questions_share(tmp_path):
    cache = several_anchors()
    write_cache(cache, tmp_path / "cache.parquet")
    torch.save(cache.state_dict(), tmp_path / "state.ckpt")
    of_file = read_cache(tmp_path / "cache.parquet", "abc")
    of_state = ExperienceCache("abc")
    of_state.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    for loaded in (of_file, of_state):
        assert cache_contents(loaded) == cache_contents(cache)
        assert tokens(loaded, "both") == [[1, 2, 3], [4, 5]]
        assert tokens(loaded, "wrong only") == [[6]]
        assert [a.step for a in loaded.entry("both").anchors] == [4, 2]
        assert loaded.entry("wrong only").slots[:2] == [None, None]
        assert loaded.shared == {"mean": [0.1, 1 / 3]}


def test_statistics_are_over_the_responses_of_all_slots():
    cache = several_anchors()
    expected = {
        "entries": 3, "responses": 3, "correct_share": 1 / 3, "length": 2, "age": 10 - (4 + 2 + 0) / 3,
        "initial_token_share": 1 / 6,
    }  # fmt: skip
    assert cache.statistics(10) == pytest.approx(expected)
    cache.forget_updates()
    assert [a.spans for a in cache.entry("both").anchors] == [((-1, 3),), ((-1, 2),)]
    assert cache.statistics(10)["initial_token_share"] == 1.0


def test_a_checkpoint_of_format_2_is_read_as_one_anchor_for_each_question():
    (state,) = (
        of_callback["cache"]
        for of_callback in torch.load(SAVED / "checkpoint.ckpt", weights_only=True)["callbacks"].values()
        if "cache" in of_callback
    )
    assert state["version"] == 2
    loaded = ExperienceCache(state["tokenizer"])
    loaded.load_state_dict(state)
    assert cache_contents(loaded) == cache_contents(read_cache(SAVED / "cache.parquet", state["tokenizer"]))
    assert [len(entry.anchors) for entry in loaded] == [1] * 6


def test_a_group_leaves_a_right_and_a_wrong_anchor_each_in_a_slot_of_its_own():
    prefixes = served(AnchorsRefresh(correct=1, wrong=1))
    prefixes.record(make_group([0.0, 0.0], [(7, 8, 2), (7, 8, 2)]))
    assert tokens(prefixes.cache) == [[7, 8, 2]]
    assert prefixes.request(PROMPT).cached_correct is False
    prefixes.record(make_group([1.0, 0.0], [(3, 4, 2), (5, 6, 2)], step=1))
    assert tokens(prefixes.cache) == [[5, 6, 2], [3, 4, 2]]
    request = prefixes.request(PROMPT)
    assert (request.prefix_ids, request.cached_correct, request.prefix_spans[-1]) == ((3, 4), True, (1, 2))


def test_the_anchor_of_the_same_verdict_that_is_oldest_is_replaced():
    prefixes = served(AnchorsRefresh(correct=2, wrong=1))
    for step, ids in ((5, (1, 2)), (6, (3, 2)), (7, (4, 2))):
        prefixes.record(make_group([1.0, 1.0], [ids, ids], step=step))
    assert tokens(prefixes.cache) == [[4, 2], [3, 2]]
    prefixes.record(make_group([0.0, 0.0], [(9, 2), (9, 2)], step=8))
    assert tokens(prefixes.cache) == [[4, 2], [3, 2], [9, 2]]


def test_an_own_response_replaces_a_trace_first_and_one_that_continues_a_trace_replaces_no_own_one():
    rule = AnchorsRefresh(correct=2, wrong=0)
    own, trace, mixed = response(1, step=3), response(2, step=-1), CachedResponse(
        np.array([2, 4], np.int32), 1.0, True, True, ((-1, 1), (5, 1))
    )  # fmt: skip
    assert rule.slot([own, trace], response(5, step=9), prefer_own=True) == 1
    assert rule.slot([own, mixed], response(6, step=9), prefer_own=True) == 1  # though its last token is newer
    assert rule.slot([own, trace], mixed, prefer_own=True) == 1
    assert rule.slot([own, own], mixed, prefer_own=True) is None
    assert rule.slot([own, trace], response(5, step=9), prefer_own=False) == 0
    assert rule.slot([trace, trace], response(5, step=9), prefer_own=False) is None
    assert rule.slot([own, trace], response(5, correct=False), prefer_own=True) is None


@pytest.mark.parametrize(("prefer_own", "kept"), [(True, [5, 6, 2]), (False, [1, 2, 3])])
def test_with_one_response_a_trace_stays_only_if_own_ones_are_not_preferred(prefer_own, kept):
    prefixes = served(CorrectMemberRefresh(), prefer_own=prefer_own)
    prefixes.cache.remember("q", response(1, 2, 3, step=-1))
    prefixes.record(make_group([0.0, 1.0], [(3, 4, 2), (5, 6, 2)]))
    assert tokens(prefixes.cache) == [kept]


def test_an_initial_group_fills_the_slots_with_its_best_responses_of_each_verdict():
    prefixes = served(AnchorsRefresh(correct=1, wrong=1))
    group = make_group([0.1, 0.9, 0.7, 0.3], [(3, 2), (4, 2), (5, 2), (6, 2)], correct=[False, True, True, False])
    uid, responses = prefixes.initial_update(group)
    prefixes.initialise(uid, responses)
    assert tokens(prefixes.cache) == [[4, 2], [6, 2]]
    assert prefixes.cache.entry("q").visits == 0


def test_impossible_numbers_of_anchors_are_refused():
    for correct, wrong in ((0, 1), (1, -1)):
        with pytest.raises(ConfigurationError, match="correct >= 1 and wrong >= 0"):
            AnchorsRefresh(correct, wrong)


def test_a_question_is_asked_whether_it_has_an_anchor_and_for_its_first_correct_one():
    cache = several_anchors()
    cache.remember("wrong only", response(8), slot=3)
    cache.remember("wrong only", response(9), slot=4)
    assert [cache.has_anchor(uid) for uid in ("both", "wrong only", "nothing", "unknown")] == [True, True, False, False]
    assert "unknown" not in cache
    assert cache.entry("wrong only").first_correct.token_ids.tolist() == [8]
    assert cache.entry("nothing").first_correct is None


@pytest.mark.parametrize(
    ("held", "taken"), [([], 3), ([response(1)], 3), ([response(1), response(2, correct=False)], 0)]
)
def test_filling_takes_no_response_once_the_slots_are_full(held, taken):
    offered = iter([response(3), response(4), response(5, correct=False), response(6), response(7, correct=False)])
    found = AnchorsRefresh(correct=1, wrong=1).fill(held, offered)
    assert [r.token_ids.tolist() for r in found.values()] == [[3], [5]][len(held) :]
    assert len(list(offered)) == 5 - taken


def test_a_file_holds_the_notes_on_a_question_once(tmp_path):
    cache = several_anchors()
    write_cache(cache, tmp_path / "cache.parquet")
    rows = pq.read_table(tmp_path / "cache.parquet", columns=["uid", "slot", "state"]).to_pylist()
    assert [(r["slot"], r["state"]) for r in rows if r["uid"] == "both"] == [(0, '{"level": -0.25}'), (1, "")]


def test_rows_are_exported_one_after_the_other(tokenizer):
    cache = several_anchors()
    rows = exported_rows(cache, tokenizer, {})
    assert next(rows)["token_ids"] == [1, 2, 3]
    cache.remember("wrong only", response(7, correct=False), slot=2)  # a list of all would not notice
    assert [row["token_ids"] for row in rows] == [[4, 5], [7]]


class WritesDown(EpsilonGreedyRefresh):
    """Keeps the first response, and writes down what it is asked."""

    def __init__(self):
        super().__init__(epsilon=1.0)
        self.asked = []

    def choose(self, group, candidates, rng):
        self.asked.append(("choose", len(candidates)))
        return super().choose(group, candidates, rng)

    def slot(self, anchors, response, prefer_own):
        self.asked.append(("slot", response.correct))
        return 0 if anchors[0] is None else None


def test_a_rule_is_asked_after_every_group_and_for_every_response():
    rule = WritesDown()
    prefixes = served(rule)
    prefixes.record(make_group([1.0, 1.0], [(3, 2), (3, 2)]))
    prefixes.record(make_group([0.0, 0.0], [(4, 2), (4, 2)]))
    prefixes.record(make_group([0.0, 0.0], [(5,), (5,)], finished=[False, False]))
    assert rule.asked == [("choose", 2), ("slot", True), ("choose", 2), ("slot", False), ("choose", 0)]
    assert tokens(prefixes.cache) == [[3, 2]]  # as the rule said


def test_wrong_anchors_that_another_rule_left_are_replaced_first_and_correct_ones_by_no_wrong_one():
    prefixes = served(AnchorsRefresh(correct=2, wrong=0))
    prefixes.cache.remember("q", response(1, 2, correct=False, step=3))
    prefixes.cache.remember("q", response(3, 2, correct=True, step=1), slot=1)
    prefixes.cache.remember("q", response(4, 2, correct=False, step=2), slot=2)
    held = [[[1, 2], [3, 2], [4, 2]], [[1, 2], [3, 2], [5, 2]], [[6, 2], [3, 2], [5, 2]], [[6, 2], [7, 2], [5, 2]]]
    assert tokens(prefixes.cache) == held[0]
    for step, after in enumerate(held[1:], start=5):
        prefixes.record(make_group([0.0, 0.0], [(9, 2), (9, 2)], step=step))
        prefixes.record(make_group([1.0, 0.0], [(step, 2), (9, 2)], step=step))
        assert tokens(prefixes.cache) == after
    rule, right, wrong = AnchorsRefresh(correct=1, wrong=1), response(1), response(2, correct=False)
    assert rule.slot([right, right], wrong, prefer_own=True) == 2
    assert rule.slot([right, wrong], wrong, prefer_own=True) == 1
    assert AnchorsRefresh(1, 0).slot([wrong], wrong, prefer_own=True) is None
