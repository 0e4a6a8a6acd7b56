"""The grader: a verifier, the terms of the reward, and the processes that they run in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import AnswerVerifier, Reward, Verifier
from rpo_lightning.rewards.calls import collect_results
from rpo_lightning.rewards.functions import FunctionReward
from rpo_lightning.rewards.grading import GradedGroup, Grading, OddScores
from rpo_lightning.rewards.pool import GradingPool

log = logging.getLogger(__name__)

# What is logged as reward/… besides the terms.
_OTHER_METRICS = ("mean", "std", "correct_share", "grading_killed", "grading_failed")


class Grader:
    """Scores whole responses.

    Args:
        verifier: Decides what is right.
        rewards: Terms of the total reward; a function stands for a ``FunctionReward``.
        pool: Where calls that may hang are made.
    """

    def __init__(self, verifier: Verifier, rewards: Sequence[Reward | Callable[..., Any]], pool: GradingPool) -> None:
        self.rewards = [r if isinstance(r, Reward) else FunctionReward(r) for r in rewards]
        if not rewards:
            raise ConfigurationError("model.rewards is empty: name at least one reward, e.g. AccuracyReward")
        doubled = [name for name, count in Counter(r.name for r in self.rewards).items() if count > 1]
        if doubled:
            raise ConfigurationError(f"model.rewards has more than one term named {doubled[0]!r}")
        taken = [r.name for r in self.rewards if r.name in _OTHER_METRICS]
        if taken:
            raise ConfigurationError(
                f"model.rewards has a term named {taken[0]!r}, and reward/{taken[0]} is another metric: rename it"
            )
        self.verifier = verifier
        self.pool = pool
        self._odd_scores = OddScores()

    def begin(self) -> Grading:
        """Begin to grade a rollout, whose responses are submitted one by one."""
        return Grading(self.verifier, self.rewards, self.pool, self._odd_scores)

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
        return self.verifier.tells_answers

    def answer_classes(self, groups: Sequence[Sequence[Sample]]) -> list[list[int]]:
        """Equal numbers for equivalent answers of a question, -1 for none; all -1 where telling took too long."""
        found: list[list[int] | None] = [None] * len(groups)
        submitted = {}
        for number, group in enumerate(groups):
            verifier = self.verifier.of_row(group[0].row)
            assert isinstance(verifier, AnswerVerifier)
            responses = [sample.response for sample in group]
            if verifier.isolated:
                # Answers are compared with one another, so the limit grows with their number.
                call = self.pool.submit(verifier.answer_classes, *responses, limits=len(responses))
                submitted[number] = (group[0], call)
            else:
                found[number] = verifier.answer_classes(*responses)
        results = collect_results(self.pool, submitted.values(), killed=None)
        for number, classes in zip(submitted, results, strict=True):
            found[number] = classes
        undetermined = sum(classes is None for classes in found)
        if undetermined:
            log.warning(f"answers to {undetermined} questions took too long to compare: they have no vote")
        return [[-1] * len(group) if classes is None else classes for group, classes in zip(groups, found, strict=True)]
