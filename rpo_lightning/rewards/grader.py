"""The grader: verdict first, then every reward term, then their weighted sum."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rpo_lightning.core.errors import ConfigurationError, RewardError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import AnswerVerifier, Reward, Verifier
from rpo_lightning.rewards.pool import GradingPool

log = logging.getLogger(__name__)

# What is logged as reward/… besides the terms.
_OTHER_METRICS = ("mean", "std", "correct_share", "grading_killed")


@dataclass(frozen=True)
class GradedGroup:
    """Verdicts and rewards of one group.

    Attributes:
        samples: The members with their verdicts.
        rewards: Weighted sum of the terms, one a member.
        terms: Unweighted values of each term.
    """

    samples: list[Sample]
    rewards: list[float]
    terms: dict[str, list[float]]


class Grader:
    """Scores whole responses.

    Args:
        verifier: Decides what is right.
        rewards: Terms of the total reward.
        pool: Where calls that may hang are made.
    """

    def __init__(self, verifier: Verifier, rewards: Sequence[Reward], pool: GradingPool) -> None:
        if not rewards:
            raise ConfigurationError("model.rewards is empty: name at least one reward, e.g. AccuracyReward")
        doubled = [name for name, count in Counter(r.name for r in rewards).items() if count > 1]
        if doubled:
            raise ConfigurationError(f"model.rewards has more than one term named {doubled[0]!r}")
        taken = [r.name for r in rewards if r.name in _OTHER_METRICS]
        if taken:
            raise ConfigurationError(
                f"model.rewards has a term named {taken[0]!r}, and reward/{taken[0]} is another metric: rename it"
            )
        self.verifier = verifier
        self.rewards = list(rewards)
        self.pool = pool

    def verify(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the verifier's verdicts.

        Raises:
            RewardError: A verdict is no finite number.
        """
        calls = [(s.prompt, s.response, s.answer) for s in samples]
        if self.verifier.isolated:
            verdicts = self.pool.numbers(self.verifier.verify, calls)
        else:
            with _no_exit(type(self.verifier).__name__):
                verdicts = [self.verifier.verify(*call) for call in calls]
        numbers = _finite(verdicts, samples, type(self.verifier).__name__)
        return [replace(s, correct=verdict) for s, verdict in zip(samples, numbers, strict=True)]

    @property
    def finds_answers(self) -> bool:
        """Whether equivalent answers can be told."""
        return isinstance(self.verifier, AnswerVerifier)

    def answer_classes(self, groups: Sequence[Sequence[Sample]]) -> list[list[int]]:
        """Equal numbers for equivalent answers of a question, -1 for none; all -1 where telling took too long."""
        assert isinstance(self.verifier, AnswerVerifier)
        calls = [tuple(s.response for s in group) for group in groups]
        if not self.verifier.isolated:
            return [self.verifier.answer_classes(*call) for call in calls]
        # Answers are compared with one another, so the limit grows with their number.
        found = self.pool.map(self.verifier.answer_classes, calls, killed=None, limits=len(calls[0]) if calls else 1)
        undetermined = sum(classes is None for classes in found)
        if undetermined:
            log.warning(f"answers to {undetermined} questions took too long to compare: they have no vote")
        return [[-1] * len(call) if classes is None else classes for call, classes in zip(calls, found, strict=True)]

    def grade(self, groups: Sequence[Sequence[Sample]]) -> list[GradedGroup]:
        """Verdicts and rewards of several groups.

        Raises:
            RewardError: A verdict or a value of a term is no finite number, or a term's values are too many or too few.
        """
        verified = iter(self.verify([s for group in groups for s in group]))
        samples = [[next(verified) for _ in group] for group in groups]
        terms = {reward.name: self._values(reward, samples) for reward in self.rewards}
        graded = []
        for i, group in enumerate(samples):
            of_group = {name: values[i] for name, values in terms.items()}
            totals = [
                sum(reward.weight * of_group[reward.name][member] for reward in self.rewards)
                for member in range(len(group))
            ]
            graded.append(GradedGroup(group, totals, of_group))
        return graded

    def _values(self, reward: Reward, groups: Sequence[Sequence[Sample]]) -> list[list[float]]:
        source = f"reward {reward.name!r}"
        with _no_exit(source):
            values = reward.score_groups(groups, self.pool)
        if len(values) != len(groups):
            raise RewardError(f"{source} returned values of {len(values)} groups for {len(groups)}")
        return [_finite(of_group, group, source) for of_group, group in zip(values, groups, strict=True)]


@contextmanager
def _no_exit(source: str) -> Iterator[None]:
    """Turn ``exit()`` in a verifier or a reward into an error: it would end the trainer without a word."""
    try:
        yield
    except SystemExit as error:
        raise RewardError(f"{source} raised SystemExit: {error.code}") from error


def _finite(values: Sequence[float], samples: Sequence[Sample], source: str) -> list[float]:
    """Plain numbers, whatever a verifier or a reward is made of: samples and rewards travel in checkpoints."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RewardError(f"{source} returned what is no number: {error}") from error
    if len(numbers) != len(samples):
        raise RewardError(
            f"{source} returned {len(numbers)} values for {len(samples)} responses: return one number for each"
        )
    for number, sample in zip(numbers, samples, strict=True):
        if not math.isfinite(number):
            raise RewardError(
                f"{source} returned {number} for the response {sample.response[:60]!r}: return a finite number"
            )
    return numbers
