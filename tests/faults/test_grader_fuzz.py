"""Answers that are built to break a grader go through the real pool: each gets a verdict, and nothing is left."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.common.machine import hardware
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards import AccuracyReward, Grader, GradingPool, MathVerifier
from tests.conftest import Processes
from tests.faults.hostile_answers import ENDLESS, Answer, answers, endless

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "grader_fuzz.json"
MEMORY_GIB = 1.0
BATCH = 500


class Memory:
    """The largest unshared memory of any child, and how much this process has grown, in bytes, sampled.

    Attributes:
        seen: The children that there were.
    """

    def __init__(self):
        self.workers = self.trainer = 0
        self.seen = set()
        self._before = psutil.Process().memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        process = psutil.Process()
        while not self._done.wait(0.2):
            self.trainer = max(self.trainer, process.memory_info().rss - self._before)
            for child in process.children():
                self.seen.add(child)
                try:
                    self.workers = max(self.workers, child.memory_full_info().uss)
                except psutil.Error:  # it has just ended
                    continue


def grade(tried: list[Answer], processes: Processes, workers: int, seconds: float) -> dict:
    """Grade answers in batches, check the verdicts that are known, and return figures."""
    pool = GradingPool(workers=workers, timeout_seconds=seconds, memory_gib=MEMORY_GIB)
    grader = Grader(MathVerifier(), [AccuracyReward()], pool)
    start = time.monotonic()
    with Memory() as memory:
        for begin in range(0, len(tried), BATCH):
            batch = tried[begin : begin + BATCH]
            (group,) = grader.grade([[Sample("q", a.response, a.gold, 1, True) for a in batch]])
            wrong = [a for a, r in zip(batch, group.rewards, strict=True) if a.verdict is not None and r != a.verdict]
            assert wrong == []
    took = time.monotonic() - start
    pool.close()
    return {
        "answers": len(tried),
        "kinds": len({a.kind for a in tried}),
        "verdicts known": sum(a.verdict is not None for a in tried),
        "built to be endless": sum(a.kind == ENDLESS for a in tried),
        "seconds": round(took, 1),
        "limit_seconds": seconds,
        "workers": workers,
        "processes_that_graded": len(memory.seen),
        "killed": pool.killed,
        "peak_mib_of_a_worker": round(memory.workers / 2**20, 1),
        "growth_mib_of_the_trainer": round(memory.trainer / 2**20, 1),
        "processes_left": len(processes.now()),
    }


def mixed(count: int, of_endless: int, seed: int) -> list[Answer]:
    """Answers, of which some take as long as they are let, at random places."""
    source = random.Random(seed)
    tried = list(answers(count - of_endless, seed)) + [endless(source) for _ in range(of_endless)]
    source.shuffle(tried)
    return tried


@pytest.mark.parametrize(
    "text",
    [
        "(((((85^85)^85)^85)^85)^85)",
        "(" * 250 + "1" + ")" * 250,
        "e^{" * 8 + "2" + "}" * 8,
        r"\sin(" * 60 + "x" + ")" * 60,
        r"\text{" * 16_000 + "1" + "}" * 16_000,
    ],
    ids=["powers of powers", "brackets", "exponentials", "functions", "texts"],
)
def test_what_is_too_nested_to_be_computed_is_compared_as_text(text):
    pool = GradingPool(workers=1, timeout_seconds=120.0)
    calls = [("q", rf"\boxed{{{text}}}", gold) for gold in ("x+1", text)]
    assert pool.numbers(MathVerifier().verify, calls) == [0.0, 1.0]
    assert pool.killed == 0
    pool.close()


def test_hostile_answers_get_verdicts_and_the_known_ones_between_them_are_right(processes):
    figures = grade(mixed(300, of_endless=0, seed=1), processes, workers=2, seconds=60.0)
    assert figures["processes_left"] == 0
    assert figures["peak_mib_of_a_worker"] < MEMORY_GIB * 1024


@pytest.mark.soak
def test_twenty_thousand_hostile_answers_are_graded_in_bounded_time_and_memory(processes):
    figures = grade(mixed(20_000, of_endless=12, seed=2), processes, workers=2, seconds=20.0)
    RESULTS.write_text(json.dumps({"hardware": hardware(), **figures}, indent=2) + "\n")
    assert figures["processes_left"] == 0
    # Some of those that were built to be endless end in time.
    assert 0 < figures["killed"] < 0.01 * figures["answers"]
    # Those that were not killed were replaced after so many calls.
    assert figures["processes_that_graded"] > figures["killed"] + figures["workers"]
    assert figures["peak_mib_of_a_worker"] < MEMORY_GIB * 1024
    assert figures["growth_mib_of_the_trainer"] < 1024
