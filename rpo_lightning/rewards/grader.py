"""The grader: a verifier, the terms of the reward, and the processes that they run in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import AnswerVerifier, Reward, Verifier
from rpo_lightning.rewards.grading import GradedGroup, Grading
from rpo_lightning.rewards.pool import GradingPool

log = logging.getLogger(__name__)

# What is logged as reward/… besides the terms.
_OTHER_METRICS = ("mean", "std", "correct_share", "grading_killed")


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

    def begin(self) -> Grading:
        """Begin to grade a rollout, whose responses are submitted one by one."""
        return Grading(self.verifier, self.rewards, self.pool)

    def grade(self, groups: Sequence[Sequence[Sample]]) -> list[GradedGroup]:
        """Verdicts and rewards of several groups; see ``Grading.finish``."""
        grading = self.begin()
        for number, group in enumerate(groups):
            for member, sample in enumerate(group):
                grading.submit(number, member, sample)
        return grading.finish()

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
        submitted = [self.pool.submit(self.verifier.answer_classes, *call, limits=len(call)) for call in calls]
        found = self.pool.collect(submitted, killed=None)
        undetermined = sum(classes is None for classes in found)
        if undetermined:
            log.warning(f"answers to {undetermined} questions took too long to compare: they have no vote")
        return [[-1] * len(call) if classes is None else classes for call, classes in zip(calls, found, strict=True)]
