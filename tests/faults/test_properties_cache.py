"""Whatever happens to a cache, it equals a plain dictionary; cuts and spans keep their bounds."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, FractionOfShortestCut, GroupOutcome, UniformCut
from rpo_lightning.cache.draws import drawn_prefix
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.spans import cut_spans, extend_spans, flat_spans, initial_tokens, nested_spans
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.cache.success_cuts import BisectionCut, TargetSuccessCut
from tests.faults.properties import fixed, responses, spans

UIDS = st.sampled_from(["a", "b", "c", "d"])
STEPS = st.one_of(
    st.tuples(st.just("put"), UIDS, responses(), st.integers(0, 2)),
    st.tuples(st.just("visit"), UIDS, st.integers(0, 5), st.booleans()),
    st.tuples(st.just("note"), UIDS, st.dictionaries(st.sampled_from("xy"), st.integers(0, 9), min_size=1)),
    st.tuples(st.just("share"), st.dictionaries(st.sampled_from("xy"), st.integers(0, 9))),
    st.tuples(st.just("forget")),
    st.tuples(st.just("file")),
    st.tuples(st.just("checkpoint")),
)


class Model:
    """A cache as plain dictionaries."""

    def __init__(self):
        self.entries, self.shared = {}, {}

    def entry(self, uid):
        return self.entries.setdefault(uid, {"visits": 0, "restart": False, "state": {}, "slots": {}})


def contents(cache: ExperienceCache):
    of_entries = {
        entry.uid: (
            entry.visits, entry.restart, entry.state,
            {slot: plain(held) for slot, held in enumerate(entry.slots) if held is not None},
        )
        for entry in cache
    }  # fmt: skip
    return list(of_entries), of_entries, cache.shared


def expected(model: Model):
    of_entries = {uid: (e["visits"], e["restart"], e["state"], e["slots"]) for uid, e in model.entries.items()}
    return list(of_entries), of_entries, model.shared


def plain(response: CachedResponse):
    return response.token_ids.tolist(), response.reward, response.correct, response.finished, response.spans


def through_file(cache: ExperienceCache) -> ExperienceCache:
    with TemporaryDirectory() as folder:
        write_cache(cache, Path(folder) / "cache.parquet")
        return read_cache(Path(folder) / "cache.parquet", "abc", 2**31)


def through_checkpoint(cache: ExperienceCache) -> ExperienceCache:
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    loaded = ExperienceCache("abc", 2**31)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return loaded


@fixed
@given(st.lists(STEPS, max_size=25))
def test_a_cache_equals_plain_dictionaries_after_any_changes_and_round_trips(steps):
    cache, model = ExperienceCache("abc"), Model()
    for kind, *given_ in steps:
        if kind == "put":
            uid, response, slot = given_
            cache.remember(uid, response, slot)
            model.entry(uid)["slots"][slot] = plain(response)
        elif kind == "visit":
            uid, visits, restart = given_
            cache.entry(uid).visits, cache.entry(uid).restart = visits, restart
            model.entry(uid).update(visits=visits, restart=restart)
        elif kind == "note":
            uid, state = given_
            cache.entry(uid).state = dict(state)
            model.entry(uid)["state"] = state
        elif kind == "share":
            cache.shared = dict(given_[0])
            model.shared = given_[0]
        elif kind == "forget":
            cache.forget_updates()
            for entry in model.entries.values():
                entry["slots"] = {n: (*held[:4], ((-1, len(held[0])),)) for n, held in entry["slots"].items()}
        else:
            cache = through_file(cache) if kind == "file" else through_checkpoint(cache)
        assert contents(cache) == expected(model)
    for through in (through_file, through_checkpoint):
        assert contents(through(cache)) == expected(model)
    held = [held for entry in model.entries.values() for held in entry["slots"].values()]
    found = cache.statistics(step=10)
    assert (found["entries"], found["responses"]) == (len(model.entries), len(held))
    if held:
        assert found["correct_share"] == sum(correct for _, _, correct, _, _ in held) / len(held)
        assert found["length"] == sum(len(ids) for ids, *_ in held) / len(held)


CUTS = st.sampled_from(
    [UniformCut(1), UniformCut(300), FractionOfShortestCut(0.5), FractionOfShortestCut(1.0), AnchoredCut(0.0, 0.9),
     AnchoredCut(0.5, 0.5, plain_share=0.3), TargetSuccessCut(), TargetSuccessCut(failing_prefixes=True),
     BisectionCut()]
)  # fmt: skip


@fixed
@given(
    CUTS, st.lists(responses(40), min_size=1, max_size=3), st.lists(st.booleans(), max_size=4), st.integers(1, 50),
    st.integers(0, 3),
)  # fmt: skip
def test_a_cut_keeps_a_part_that_leaves_room_and_draws_the_same_again(cut, held, verdicts, limit, visits):
    cache = ExperienceCache("abc")
    for slot, response in enumerate(held):
        cache.remember("q", response, slot)
    entry = cache.entry("q")
    if verdicts:
        length = min(len(held[0]) - 1, 5)
        lengths = [len(held[0])] * len(verdicts)
        outcome = GroupOutcome(length, len(held[0]) - length, [0.0] * len(verdicts), verdicts, lengths, held[0].correct)
        cut.observe(entry, outcome)
        cut.end_iteration(cache)
    assert cut.state_problem(entry.state) is None
    assert cut.shared_problem(cache.shared) is None
    entry.visits = visits
    response, length = drawn_prefix(cut, entry, response_limit=limit)
    again, same = drawn_prefix(cut, entry, response_limit=limit)
    assert same == length
    assert (again is None) == (response is None)
    if response is None:
        assert length == 0
    else:
        assert any(np.array_equal(response.token_ids, other.token_ids) for other in held)
        assert 0 <= length < min(len(response), limit) or length == 0


@st.composite
def ids_and_length(draw):
    """Tokens, some of which end a step, and a length; most of them between two ends."""
    ids = draw(st.lists(st.sampled_from([0, 1, 2, 7, 8, 9]), min_size=1, max_size=30))
    return ids, draw(st.integers(1, len(ids)))


@fixed
@given(ids_and_length(), st.sets(st.sampled_from([0, 7]), min_size=1))
def test_the_nearest_end_of_a_step_is_one_and_none_is_nearer(tokens, ending):
    ids, length = tokens
    found = StepEnds(np.array([token in ending for token in range(8)])).nearest(np.array(ids), length)
    ends = [place + 1 for place, token in enumerate(ids) if token in ending]  # ids from 8 on are no known tokens
    assert found == min(ends, key=lambda end: (abs(end - length), end), default=length)


@fixed
@given(st.lists(st.integers(0, 20).flatmap(spans), max_size=5), st.data())
def test_spans_partition_a_response_through_cuts_extensions_and_round_trips(many, data):
    assert nested_spans(*flat_spans(many)) == many
    for of_response in many:
        steps = [step for step, count in of_response for _ in range(count)]
        kept = data.draw(st.integers(0, len(steps)))
        cut = cut_spans(of_response, kept)
        assert [step for step, count in cut for _ in range(count)] == steps[:kept]
        longer = extend_spans(cut, 3, step=5)
        assert [step for step, count in longer for _ in range(count)] == [*steps[:kept], 5, 5, 5]
        # Tokens of one update are one span.
        assert len(longer) == len(cut) + (not cut or cut[-1][0] != 5)
        assert extend_spans(cut, 0, step=5) == cut
        assert initial_tokens(of_response) == sum(step <= 0 for step in steps)
        assert all(count > 0 for _, count in longer)
