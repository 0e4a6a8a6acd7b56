"""Rewards that look at the length of a response, in tokens, prefix included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import Reward


class LengthAwareAccuracyReward(Reward):
    """RPO's length-aware reward shaping (eq. 11), in place of ``AccuracyReward``.

    A correct response gets ``clip(1 / (1 + exp(-alpha · (reference - length))), lower, upper)``: the
    shorter the better, which keeps differences inside a group whose members are all correct.
    Deviation: taken literally the lower clip would pay ``lower`` to a wrong response too; wrong
    responses get 0.

    Args:
        alpha: Steepness per token (paper: 0.01).
        lower: Least reward of a correct response (the paper's m).
        upper: Largest reward (the paper's M).
        reference: Mean length over the whole ``group`` (paper) or over its ``correct`` members.
        weight: Factor of the term in the sum.
    """

    def __init__(
        self,
        alpha: float = 0.01,
        lower: float = 0.5,
        upper: float = 1.0,
        reference: Literal["group", "correct"] = "group",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if alpha <= 0 or not 0 <= lower < upper:
            raise ConfigurationError(
                f"length-aware shaping needs alpha > 0 and 0 <= lower < upper; got {alpha}, {lower}, {upper}"
            )
        self.alpha = alpha
        self.lower = lower
        self.upper = upper
        self.reference = reference

    def score(self, group: Sequence[Sample]) -> list[float]:
        """Shaped accuracy."""
        members = [s for s in group if s.is_correct] if self.reference == "correct" else list(group)
        reference = sum(s.length for s in members) / len(members) if members else 0.0
        return [self._shape(s.correct, reference - s.length) if s.is_correct else 0.0 for s in group]

    def _shape(self, correct: float, shorter_by: float) -> float:
        exponent = min(max(-self.alpha * shorter_by, -60.0), 60.0)
        return min(max(correct / (1 + math.exp(exponent)), self.lower), self.upper)


class CosineLengthReward(Reward):
    """Cosine-scaled length reward (arXiv 2502.03373): short right answers earn most, short wrong ones least.

    Args:
        max_length: Length at which the schedule ends, in tokens.
        correct_short: Value of a right answer of length 0.
        correct_long: Value of a right answer of ``max_length``.
        wrong_short: Value of a wrong answer of length 0.
        wrong_long: Value of a wrong answer of ``max_length``.
        weight: Factor of the term in the sum.
    """

    def __init__(
        self,
        max_length: int,
        correct_short: float = 1.0,
        correct_long: float = 0.5,
        wrong_short: float = -1.0,
        wrong_long: float = -0.5,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if max_length < 1:
            raise ConfigurationError(f"CosineLengthReward.max_length must be at least 1 token, got {max_length}")
        self.max_length = max_length
        self.correct = (correct_short, correct_long)
        self.wrong = (wrong_short, wrong_long)

    def score(self, group: Sequence[Sample]) -> list[float]:
        """Half a cosine period from the short to the long value."""
        values = []
        for sample in group:
            short, long = self.correct if sample.is_correct else self.wrong
            progress = min(sample.length / self.max_length, 1.0)
            values.append(long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress)))
        return values


class KimiLengthReward(Reward):
    """Length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3).

    ``λ = 0.5 - (length - shortest) / (longest - shortest)`` within the group; right answers get λ,
    wrong ones min(0, λ); 0 where all lengths are equal.
    """

    def score(self, group: Sequence[Sample]) -> list[float]:
        """Relative length within the group."""
        shortest = min(s.length for s in group)
        longest = max(s.length for s in group)
        if shortest == longest:
            return [0.0] * len(group)
        scale = [0.5 - (s.length - shortest) / (longest - shortest) for s in group]
        return [x if s.is_correct else min(0.0, x) for x, s in zip(scale, group, strict=True)]


class SoftOverlongPenalty(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    0 up to ``limit - buffer`` tokens, then linearly down to -1 at ``limit``.

    Args:
        limit: Response limit in tokens.
        buffer: Length of the slope in tokens.
        weight: Factor of the term in the sum.
    """

    def __init__(self, limit: int, buffer: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 < buffer <= limit:
            raise ConfigurationError(f"SoftOverlongPenalty needs 0 < buffer <= limit, got {buffer} and {limit}")
        self.limit = limit
        self.buffer = buffer

    def score(self, group: Sequence[Sample]) -> list[float]:
        """The penalty of each response, in [-1, 0]."""
        return [min(0.0, max(-1.0, (self.limit - self.buffer - s.length) / self.buffer)) for s in group]
