"""From sampled answers to estimates of an iteration.

An *arm* is a way to choose prefixes: none, a fixed share of a correct response, or the config's cut. Every arm answers
the same questions, and a bootstrap draws the same questions for all of them. Intervals therefore hold for differences
between arms too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, inf
from typing import Any

import torch

from rpo_lightning.evaluation import Estimate
from rpo_lightning.evaluation.metrics import bootstrap_means

NO_PREFIX = "no prefix"


@dataclass(frozen=True)
class Answers:
    """The answers to a question in one arm.

    Attributes:
        arm: Name of the arm.
        uid: The question.
        correct: The verifier's verdict on each answer.
        tokens: Tokens decoded for each answer: its suffix.
        prefix_tokens: Tokens of the prefix; 0 without one.
        cached_tokens: Length of the response that was cut; 0 without one.
        seconds: The question's share of the seconds that its batch took to decode and grade.
    """

    arm: str
    uid: str
    correct: tuple[bool, ...]
    tokens: tuple[int, ...]
    prefix_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True)
class Iteration:
    """The size of an iteration.

    Attributes:
        groups: Groups of an iteration on all ranks.
        group_size: Members of a group.
        ranks: Devices that share the groups.
        drops_groups: Whether dynamic sampling leaves groups without both verdicts out of the update.
    """

    groups: int
    group_size: int
    ranks: int = 1
    drops_groups: bool = False

    @property
    def responses(self) -> int:
        """Responses of an iteration on all ranks."""
        return self.groups * self.group_size


@dataclass(frozen=True)
class UpdateSeconds:
    """Seconds of an iteration's update for each response that it trains on.

    Attributes:
        old_logprobs: Seconds of the old log-probs; 0 if the update needs none.
        passes: Seconds of all forward and backward passes over it.
    """

    old_logprobs: float
    passes: float


@dataclass(frozen=True)
class ArmEstimate:
    """What an iteration of one arm is estimated to be like. Intervals are over questions.

    Attributes:
        name: Name of the arm.
        questions: Questions answered.
        prefixed: How many of them had a prefix.
        kept_share: Mean share of the response that these prefixes kept; 0 if there were none.
        success: Share of right answers.
        informative: Share of groups with right and wrong members.
        tokens: Decoded tokens of an iteration.
        rollout_seconds: Seconds of decoding and grading in an iteration.
        old_logprobs_seconds: Seconds of an iteration's old log-probs, 0 if it needs none; ``None`` if not measured.
        update_seconds: Seconds of the forward and backward passes of an iteration; ``None`` if not measured.
    """

    name: str
    questions: int
    prefixed: int
    kept_share: float
    success: Estimate
    informative: Estimate
    tokens: Estimate
    rollout_seconds: Estimate
    old_logprobs_seconds: float | None
    update_seconds: float | None

    @classmethod
    def of(
        cls, rows: Sequence[Answers], iteration: Iteration, response_seconds: UpdateSeconds | None = None
    ) -> ArmEstimate:
        """Estimate an arm.

        Args:
            rows: Its answers, in the same order of questions for every arm.
            iteration: Size of an iteration.
            response_seconds: Seconds of the update for each response; ``None`` if not measured.
        """
        size = iteration.group_size
        decoded = sum(sum(row.tokens) for row in rows)
        tokens = scaled(_mean([sum(row.tokens) / len(row.tokens) for row in rows]), iteration.responses)
        informative = _share([informative_probability(sum(r.correct), len(r.correct), size) for r in rows])
        trained = iteration.responses / iteration.ranks * (informative.value if iteration.drops_groups else 1.0)
        kept = [row.prefix_tokens / row.cached_tokens for row in rows if row.prefix_tokens]
        return cls(
            name=rows[0].arm,
            questions=len(rows),
            prefixed=len(kept),
            kept_share=sum(kept) / len(kept) if kept else 0.0,
            success=_share([sum(row.correct) / len(row.correct) for row in rows]),
            informative=informative,
            tokens=tokens,
            rollout_seconds=scaled(tokens, sum(row.seconds for row in rows) / max(decoded, 1) / iteration.ranks),
            old_logprobs_seconds=None if response_seconds is None else response_seconds.old_logprobs * trained,
            update_seconds=None if response_seconds is None else response_seconds.passes * trained,
        )

    @property
    def seconds(self) -> Estimate:
        """Seconds of an iteration: rollout, old log-probs, update. The interval is that of the decoded tokens."""
        added, rollout = (self.old_logprobs_seconds or 0.0) + (self.update_seconds or 0.0), self.rollout_seconds
        return Estimate(rollout.value + added, rollout.low + added, rollout.high + added, rollout.resampled + added)

    def tokens_per_informative_group(self, iteration: Iteration) -> float:
        """Decoded tokens for each group that teaches; infinite if there is none."""
        teaching = self.informative.value * iteration.groups
        return self.tokens.value / teaching if teaching else inf

    def teaches_more_than(self, other: ArmEstimate) -> bool:
        """Whether it clearly has more informative groups for each decoded token: with 97.5 % of the resamples."""
        mine = self.informative.resampled * other.tokens.resampled
        theirs = other.informative.resampled * self.tokens.resampled
        return bool((mine > theirs).mean() >= 0.975)

    def as_dict(self, iteration: Iteration) -> dict[str, Any]:
        """The estimates as JSON values."""
        per_group = self.tokens_per_informative_group(iteration)
        return {
            "arm": self.name,
            "questions": self.questions,
            "questions_with_prefix": self.prefixed,
            "kept_share": self.kept_share,
            "success": as_dict(self.success),
            "informative_share": as_dict(self.informative),
            "decoded_tokens": as_dict(self.tokens),
            "tokens_per_informative_group": None if per_group == inf else per_group,
            "rollout_seconds": as_dict(self.rollout_seconds),
            "old_logprobs_seconds": self.old_logprobs_seconds,
            "update_seconds": self.update_seconds,
            "seconds": as_dict(self.seconds),
        }


def informative_probability(correct: int, samples: int, group_size: int) -> float:
    """The probability that a group has right and wrong members, from other answers to its question.

    With at least ``group_size`` answers it is the share of all groups that can be drawn from them (hypergeometric).
    That is unbiased. The probability is a polynomial of degree G in the success rate, so fewer answers allow no
    unbiased estimate. Then it is that of the observed success rate, which is too low on average.

    Args:
        correct: Right answers to the question.
        samples: All answers to it.
        group_size: Members of a group (G).
    """
    if samples >= group_size:
        equal = comb(correct, group_size) + comb(samples - correct, group_size)
        return 1.0 - equal / comb(samples, group_size)
    rate = correct / samples
    return 1.0 - rate**group_size - (1.0 - rate) ** group_size


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate times a number."""
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.resampled * factor)


def as_dict(estimate: Estimate) -> dict[str, float]:
    """An estimate as JSON values."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate.of_values(torch.tensor(values, dtype=torch.float64))


def _share(values: Sequence[float]) -> Estimate:
    """The mean of values in [0, 1].

    Its interval is that of the questions and of two more, one with 0 and one with 1. If all questions agree, a
    bootstrap of them alone has an interval without width, which says too much.
    """
    alone = _mean(values)
    wider = Estimate.of(alone.value, bootstrap_means(torch.tensor([*values, 0.0, 1.0], dtype=torch.float64)))
    return Estimate(alone.value, min(wider.low, alone.value), max(wider.high, alone.value), alone.resampled)
