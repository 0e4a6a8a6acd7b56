"""Predicts how often a group succeeds, from the share of a response that its prefix keeps.

The form is that of proportional hazards. A continuation succeeds if nothing goes wrong in what is left to write. The
expected number of fatal errors there, λ, gives the success rate p = exp(-λ), and log λ is linear:

    log λ = a + u + β · log(1 - s)        after a share s of a correct response
    log λ = a + u - ω · log(1 - s)        after a share s of a wrong one
    (both with  + γ · log(length / reference length))

u belongs to the question; a, β, ω and γ to all of them. With β = 1, every token that is left goes wrong equally often,
and p = p0^(1 - s) for a question that is solved with p0 from its start. A larger β is a policy that has seen the point
early, a smaller one a policy that fails at the end. Both kinds of prefix start from the same p0. This is a binomial
regression with a complementary log-log link (McCullagh & Nelder, Generalized Linear Models, 1989). It was preferred to
a logistic curve, since the slope of that has to differ between easy and hard questions, and to a grid with isotonic
regression, since one slope learns from every group and reaches shares that were never tried.

It learns online, as a dynamic generalized linear model (West, Harrison & Migon 1985): the coefficients have a normal
distribution, each group moves it to the mode of its posterior, and it is widened in the direction of the group before,
so that old groups fade as the policy changes. u is a random effect of the question with a prior around 0, as ratings
of players are (Glickman 1999). What is common to the questions therefore goes into the coefficients, and u keeps what
is left. The uncertainty of u and that of the coefficients are kept as if they were independent.

Item-response fits of accuracy against hint length, solved for 1/2, come from SEELE (arXiv 2509.06923). Success led to
1/2 with right and wrong prefixes comes from Prefix Sampling (arXiv 2605.05112). Both fit each question by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from rpo_lightning.cache.soundness import is_number

# a, β, ω, γ before any group: p0 = 1/4, and the errors are spread evenly over a response, whatever its length.
PRIOR_MEAN = (math.log(2 * math.log(2)), 1.0, 1.0, 0.0)
PRIOR_VARIANCE = (2.25, 0.5, 0.5, 0.25)
# u before the question's first group, in units of log λ.
LEVEL_VARIANCE = 1.0
# Weight of what is known when a new group comes: about the last 50 groups count, and two visits of a question.
MEMORY = 0.98
LEVEL_MEMORY = 0.5
# Slopes stay positive: more of a right response helps, more of a wrong one harms.
SMALLEST_SLOPE = 0.2
# Range of log λ that is told apart: success rates from 1e-9 to 1 - 1e-5.
_LOWEST, _HIGHEST = -11.0, 3.0
_BISECTIONS = 60


class SuccessPredictor:
    """Success rates of groups by kept share, kind of response and question.

    Args:
        shared: Its memory of all questions, JSON values. Reads and writes go there.
    """

    def __init__(self, shared: MutableMapping[str, Any]) -> None:
        self._shared = shared
        if "mean" not in shared:
            shared["mean"] = list(PRIOR_MEAN)
            shared["covariance"] = [
                [v if i == j else 0.0 for j in range(len(PRIOR_VARIANCE))] for i, v in enumerate(PRIOR_VARIANCE)
            ]
            shared["reference_length"] = None

    def success(
        self, kept_share: float, correct: bool, length: int | None, question: MutableMapping[str, Any]
    ) -> float:
        """Expected success rate of a group.

        Args:
            kept_share: Share s of the response that the prefix keeps, in [0, 1).
            correct: Whether the response is correct.
            length: Tokens of the question's correct response; ``None`` if it has none.
            question: The memory of the question, JSON values.
        """
        return math.exp(-math.exp(self._log_errors(self._features(kept_share, correct, length), question)))

    def kept_share(self, target: float, correct: bool, length: int | None, question: MutableMapping[str, Any]) -> float:
        """The share of a response after which a group is expected to succeed at the rate ``target``.

        Args:
            target: The success rate, in (0, 1).
            correct: Whether the response is correct.
            length: Tokens of the question's correct response; ``None`` if it has none.
            question: The memory of the question.

        Returns:
            A share in [0, 1). It is 0 if no share is needed: a correct prefix cannot lower the success rate, and a
            wrong one cannot raise it.
        """
        excess = self._log_errors(self._features(0.0, correct, length), question) - math.log(-math.log(target))
        slope = max(self._shared["mean"][1 if correct else 2], SMALLEST_SLOPE)
        needed = excess if correct else -excess
        return -math.expm1(-needed / slope) if needed > 0 else 0.0

    def observe(
        self,
        kept_share: float,
        correct: bool,
        length: int | None,
        question: MutableMapping[str, Any],
        successes: int,
        members: int,
    ) -> None:
        """Learn the outcome of a group.

        Args:
            kept_share: Share of the response that the prefix kept, 0 for none.
            correct: Whether the response is correct.
            length: Tokens of the question's correct response; ``None`` if it has none.
            question: The memory of the question. It is changed.
            successes: Correct members of the group.
            members: Members of the group.
        """
        if self._shared["reference_length"] is None:
            self._shared["reference_length"] = length
        x = self._features(kept_share, correct, length)
        covariance = self._shared["covariance"]
        spread = [_dot(row, x) for row in covariance]  # P x
        of_mean = _dot(spread, x)
        _add_outer(covariance, spread, (1 / MEMORY - 1) / of_mean)
        spread = [value / MEMORY for value in spread]
        of_mean /= MEMORY
        of_level = min(question.get("level_variance", LEVEL_VARIANCE) / LEVEL_MEMORY, LEVEL_VARIANCE)
        variance = of_mean + of_level

        expected = self._log_errors(x, question)
        change = _posterior_change(expected, variance, successes, members)
        gain = change / variance
        self._shared["mean"] = [m + s * gain for m, s in zip(self._shared["mean"], spread, strict=True)]
        question["level"] = question.get("level", 0.0) + of_level * gain
        information = _information(expected + change, members)
        shrink = information / (1 + information * variance)
        _add_outer(covariance, spread, -shrink)
        question["level_variance"] = of_level - of_level**2 * shrink

    def _features(self, kept_share: float, correct: bool, length: int | None) -> tuple[float, ...]:
        """What a, β, ω and γ are multiplied by."""
        left = math.log1p(-kept_share)
        reference = self._shared["reference_length"]
        relative = math.log(length / reference) if length and reference else 0.0
        return (1.0, left if correct else 0.0, 0.0 if correct else -left, relative)

    def _log_errors(self, x: Sequence[float], question: MutableMapping[str, Any]) -> float:
        """Log λ."""
        return _clipped(_dot(self._shared["mean"], x) + question.get("level", 0.0))


def memory_problem(shared: Any) -> str | None:
    """Why a saved memory of all questions cannot be a predictor's; ``None`` if it can."""
    size = len(PRIOR_MEAN)
    rows = [shared.get("mean"), *_rows(shared.get("covariance"))] if isinstance(shared, Mapping) else []
    if len(rows) != 1 + size or not all(len(_rows(row)) == size for row in rows):
        return f"success is no object with a mean of {size} numbers and their covariance"
    if not all(is_number(value, -sys.float_info.max) for row in rows for value in row):
        return "mean or covariance holds what is no finite number"
    if not all(rows[1 + i][i] > 0 for i in range(size)):
        return "a variance is not above 0"
    length = shared.get("reference_length")
    return None if length is None or is_number(length, 1) else f"reference_length is {str(length)[:40]!r}"


def question_problem(question: Mapping[str, Any]) -> str | None:
    """Why a saved memory of a question cannot be a predictor's; ``None`` if it can."""
    level, variance = question.get("level", 0.0), question.get("level_variance", LEVEL_VARIANCE)
    are_numbers = is_number(level, -sys.float_info.max) and is_number(variance, 0)
    return None if are_numbers else f"level is {str(level)[:40]!r} and level_variance {str(variance)[:40]!r}"


def _rows(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _posterior_change(expected: float, variance: float, successes: int, members: int) -> float:
    """Change of log λ from its prior mean to the mode of its posterior; found by bisection."""
    low = -variance * successes * math.exp(expected)
    high = variance * (members - successes)
    for _ in range(_BISECTIONS):
        change = (low + high) / 2
        if variance * _slope(expected + change, successes, members) > change:
            low = change
        else:
            high = change
    return (low + high) / 2


def _slope(log_errors: float, successes: int, members: int) -> float:
    """Derivative of the binomial log-likelihood by log λ."""
    errors = math.exp(_clipped(log_errors))
    return (members - successes) * errors / math.expm1(errors) - successes * errors


def _information(log_errors: float, members: int) -> float:
    """Fisher information of a group about log λ."""
    errors = math.exp(_clipped(log_errors))
    return members * errors**2 / math.expm1(errors)


def _clipped(log_errors: float) -> float:
    return min(max(log_errors, _LOWEST), _HIGHEST)


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def _add_outer(matrix: list[list[float]], vector: Sequence[float], factor: float) -> None:
    for row, first in zip(matrix, vector, strict=True):
        for column, second in enumerate(vector):
            row[column] += factor * first * second
