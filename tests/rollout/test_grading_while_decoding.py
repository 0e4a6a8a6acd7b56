"""Responses are graded while others are decoded; results, errors and kills are those of grading afterwards."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rpo_lightning.cache.cuts import UniformCut
from rpo_lightning.callbacks import CompletionsCallback, ExperienceCacheCallback
from rpo_lightning.core.errors import EngineError, RewardError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards import (
    AccuracyReward,
    ExactMatchVerifier,
    FunctionReward,
    FunctionVerifier,
    Grader,
    GradingPool,
    UniformRandomReward,
)
from rpo_lightning.rollout import TransformersEngine
from tests.conftest import make_data, make_module, make_trainer

NOTES = Path("not-set")  # where workers write; set before they are forked


def notes_its_start(prompt, response, answer):
    with NOTES.open("a") as file:
        file.write("started\n")
    return float(response.endswith(f"#{answer}"))


def hangs_on_long_ones(prompt, response, answer):
    time.sleep(600 if len(response) > 100 else 0)
    return 1.0


def fails(prompt, response, answer):
    raise ValueError(f"no verdict for {prompt} {response}")


def sleeps(prompt, response, answer):
    time.sleep(600)
    return 1.0


def length(prompt, response, answer):
    return len(response) / 100


def waiting(engine_class):
    """An engine that, after its first sequence has ended, goes on only when a worker has begun to grade it."""

    class Waiting(engine_class):
        ended_before = None

        def generate(self, requests, sampling, seed, on_finished=None):
            ended = []

            def wait(index, member, completion):
                on_finished(index, member, completion)
                ended.append((index, member))
                deadline = time.monotonic() + 60
                while len(ended) == 1 and not NOTES.exists():
                    assert time.monotonic() < deadline, "no grading has begun"
                    time.sleep(0.01)
                if self.ended_before is None:
                    self.ended_before = len(ended)

            return super().generate(requests, sampling, seed, wait)

    return Waiting


class Silent(TransformersEngine):
    """Tells of no sequence before all have ended, so that grading follows decoding."""

    def generate(self, requests, sampling, seed, on_finished=None):
        return super().generate(requests, sampling, seed)


class Backwards(TransformersEngine):
    """Tells of the last sequence first."""

    def generate(self, requests, sampling, seed, on_finished=None):
        completions = super().generate(requests, sampling, seed)
        for index in reversed(range(len(requests))):
            for member in reversed(range(requests[index].n)):
                on_finished(index, member, completions[index][member])
        return completions


class Asked(TransformersEngine):
    """Notes whether it is to tell of sequences that end."""

    def generate(self, requests, sampling, seed, on_finished=None):
        self.tells = on_finished is not None
        return super().generate(requests, sampling, seed, on_finished)


class Breaking(TransformersEngine):
    """Fails when its first sequences have ended."""

    def generate(self, requests, sampling, seed, on_finished=None):
        def then_break(*ended):
            on_finished(*ended)
            raise EngineError("out of order")

        return super().generate(requests, sampling, seed, then_break)


def graded(folder, engine, verifier, rewards, steps=2, **settings):
    """A run's module."""
    grading = GradingPool(workers=2, timeout_seconds=settings.pop("timeout_seconds", 10.0))
    module = make_module(engine=engine, verifier=verifier, rewards=rewards, grading=grading, **settings)
    make_trainer(folder, max_steps=steps).fit(module, datamodule=make_data())
    return module


@pytest.fixture(autouse=True)
def _idle_core(monkeypatch):
    """One core decodes, and another one is idle."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NOTES", tmp_path / "notes")
    return tmp_path / "notes"


def verifier_of(function):
    return FunctionVerifier(f"{__name__}.{function.__name__}")


def reward_of(function):
    return FunctionReward(f"{__name__}.{function.__name__}")


@pytest.mark.parametrize("verifier", [verifier_of(notes_its_start), ExactMatchVerifier()], ids=["verdict", "reward"])
def test_a_rollout_grades_while_it_decodes(tmp_path, notes, verifier):
    rewards = [AccuracyReward()] if isinstance(verifier, FunctionVerifier) else [reward_of(notes_its_start)]
    module = graded(tmp_path, waiting(TransformersEngine)(), verifier, rewards, steps=1)
    assert module.engine.ended_before == 1
    assert len(notes.read_text().splitlines()) == 16  # each response once


@pytest.mark.parametrize("engine", [TransformersEngine, Backwards])
def test_groups_do_not_depend_on_the_order_in_which_sequences_end(tmp_path, notes, engine):
    verifier, rewards = verifier_of(notes_its_start), [AccuracyReward(), reward_of(length), UniformRandomReward()]
    found = graded(tmp_path / "beside", engine(), verifier, rewards)
    expected = graded(tmp_path / "after", Silent(), verifier, rewards)
    assert found.groups == expected.groups
    assert len({tuple(group.rewards) for group in found.groups}) > 1
    for name, parameter in found.policy.state_dict().items():
        assert torch.equal(parameter, expected.policy.state_dict()[name]), name


@pytest.mark.parametrize("engine", [TransformersEngine, Backwards])
def test_the_first_failure_in_order_is_told_whichever_response_ends_first(tmp_path, engine):
    with pytest.raises(RewardError) as found:
        graded(tmp_path / "beside", engine(), verifier_of(fails), [reward_of(fails)])
    with pytest.raises(RewardError) as expected:
        graded(tmp_path / "after", Silent(), verifier_of(fails), [reward_of(fails)])
    assert str(found.value) == str(expected.value)
    assert "FunctionVerifier.verify raised ValueError: no verdict for" in str(found.value)
    assert multiprocessing.active_children() == []


def test_gradings_over_the_limit_are_killed_and_counted_while_others_are_decoded(tmp_path):
    rewards = [AccuracyReward(), UniformRandomReward()]
    module = graded(
        tmp_path, TransformersEngine(), verifier_of(hangs_on_long_ones), rewards, steps=1, timeout_seconds=0.5
    )
    samples = [s for group in module.groups for s in group.samples]
    hung = [len(s.response) > 100 for s in samples]
    assert sum(hung) > 0
    assert [s.correct for s in samples] == [0.0 if h else 1.0 for h in hung]
    assert module.record.killed == sum(hung)


def test_waiting_for_a_worker_does_not_count_towards_the_limit():
    pool = GradingPool(workers=1, timeout_seconds=2.0)
    try:
        assert pool.numbers(time_of_half_a_second, [(i,) for i in range(6)]) == [float(i) for i in range(6)]
    finally:
        pool.close()
    assert pool.killed == 0


def time_of_half_a_second(number):
    time.sleep(0.5)
    return float(number)


def test_an_engine_that_fails_leaves_no_grading_behind(tmp_path):
    with pytest.raises(EngineError, match="out of order"):
        graded(tmp_path, Breaking(), verifier_of(sleeps), [AccuracyReward()])
    assert multiprocessing.active_children() == []


def test_more_work_than_fits_into_the_workers_pipe_is_cancelled_too():
    grading = Grader(verifier_of(sleeps), [AccuracyReward()], GradingPool(workers=1)).begin()
    for member in range(100):
        grading.submit(0, member, Sample("q", "x" * 100_000, "1", 3, True))
    grading.cancel()
    assert multiprocessing.active_children() == []


def test_every_response_is_decoded_once(tmp_path):
    module = make_module(rewards=[AccuracyReward(), UniformRandomReward()])
    decoded, decode = [], module.tokenizer.decode
    module.tokenizer.decode = lambda ids, **settings: decoded.append(tuple(ids)) or decode(ids, **settings)
    cache = ExperienceCacheCallback(cut=UniformCut(40), initialisation="lazy")
    completions = CompletionsCallback(every_n_batches=1, groups=1)
    make_trainer(tmp_path, callbacks=[cache, completions], max_steps=6).fit(module, datamodule=make_data())
    # 16 responses an iteration, and the prefix of the group that is written down.
    assert len(decoded) == 6 * (16 + 1)
    of_last = Counter(g.response_ids(member) for g in module.groups for member in range(4))
    assert Counter(decoded[-17:]) >= of_last


class Workers(Callback):
    """Counts the grading processes."""

    def on_train_batch_end(self, *_):
        self.count = len(multiprocessing.active_children())


@pytest.mark.parametrize(
    ("cores", "threads", "workers", "count", "beside"),
    [
        (6, 1, None, 5 + 1, True),  # and one more, for the time that a call is slow
        (99, 1, None, 8 + 1, True),
        (6, 1, 2, 2, True),
        (6, 6, None, 6 + 1, False),
        (1, 1, None, 1 + 1, False),
    ],
)
def test_idle_cores_grade_while_others_decode_and_all_cores_afterwards_where_none_is_idle(
    tmp_path, monkeypatch, cores, threads, workers, count, beside
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found, engine = Workers(), Asked()
    module = make_module(
        engine=engine, verifier=verifier_of(length), grading=GradingPool(workers), rewards=[UniformRandomReward()]
    )
    make_trainer(tmp_path, callbacks=[found], max_steps=1).fit(module, datamodule=make_data())
    assert found.count == count
    assert engine.tells == beside


def test_cores_that_ranks_of_a_node_share_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    others = [("here", {0, 1, 2, 3, 4, 5}), ("here", {4, 5}), ("there", {0, 1, 2, 3, 4, 5})]
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine, *others])
    assert Ranks().cores() == 2  # half of four, a third of two
