"""Calls of functions in grading processes, for samples: what they are given, and whose fault it was if they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rpo_lightning.core.errors import RewardError, RPOError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.arguments import Arguments
from rpo_lightning.rewards.pool import Call, GradingPool
from rpo_lightning.rewards.serving import told


class FailedScore(float):
    """The 0 of a response for which a function raised, where that does not stop the run.

    Attributes:
        reason: The exception, in one line.
    """

    reason = ""

    @classmethod
    def of(cls, reason: str) -> FailedScore:
        """A score of 0 with its reason."""
        score = cls(0.0)
        score.reason = reason
        return score


def submit_sample(pool: GradingPool, function: Callable[..., Any], sample: Sample) -> Call[Any]:
    """Have a worker call a function with what it asks for of a sample (``Arguments``)."""
    texts, named = Arguments(function).of_sample(sample)
    return pool.submit(function, *texts, named=named)


def collect_results(pool: GradingPool, calls: Iterable[tuple[Sample, Call[Any]]], killed: Any = 0.0) -> list[Any]:
    """Wait for calls, and count scores that failed.

    Args:
        pool: The pool that they were submitted to.
        calls: The calls, each with a sample of the question that it is about.
        killed: Stands for the result of a call that was killed.

    Raises:
        RewardError: A function raised. The message has the question.
    """
    results = []
    for sample, call in calls:
        try:
            (result,) = pool.collect([call], killed)
        except RewardError as error:
            raise RewardError(f"{error}{question(sample)}") from error
        for score in result if isinstance(result, list) else [result]:
            if isinstance(score, FailedScore):
                pool.count_failure(f"{score.reason}{question(sample)}")
        results.append(result)
    return results


@contextmanager
def in_this_process(source: str, sample: Sample | None = None) -> Iterator[None]:
    """Tell what a verifier or a reward raises with its name; ``exit()`` would end the trainer without a word.

    Args:
        source: Its name.
        sample: Of the question that it is about.
    """
    try:
        yield
    except RPOError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"{source} raised {told(error)}{'' if sample is None else question(sample)}") from error


def question(sample: Sample) -> str:
    """Which question a sample is of, for the end of a message."""
    return f" (question {sample.uid})" if sample.uid else ""
