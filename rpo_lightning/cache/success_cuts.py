"""Cut strategies that follow success: they keep as much of a response as half of the group needs.

A group teaches if it has right and wrong members: with probability 1 - p^G - (1 - p)^G, which is largest at p = 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, GroupOutcome, a_correct_anchor, one_of, require_plain_share
from rpo_lightning.cache.soundness import is_number
from rpo_lightning.cache.success_predictor import SuccessPredictor, memory_problem, question_problem
from rpo_lightning.core.errors import ConfigurationError


class TargetSuccessCut(CutStrategy):
    """Keep the share of a correct response after which a group is expected to succeed half of the time.

    The share comes from a predictor over all questions, which every group of every rank updates
    (``rpo_lightning.cache.success_predictor``), with a correction for the question. A question's first prefix is
    therefore near its point already. Questions that succeed more often without a prefix take the full path. Not in the
    paper; sources are named in the predictor's module. Use it with ``CorrectMemberRefresh`` or ``AnchorsRefresh``.

    Args:
        target: The success rate to lead groups to, in (0, 1).
        spread: Each visit draws its target uniformly from ``target - spread`` to ``target + spread``: cuts vary.
        highest: Largest share of the response that becomes the prefix, below 1.
        plain_share: Share of the visits that start without a prefix: openings are practised there, and success without
            a prefix is measured.
        failing_prefixes: Whether questions that mostly succeed are cut from a wrong response, if the cache keeps one
            (``AnchorsRefresh`` with ``wrong``). Predicted as a kind of their own. Helps policies that can recover from
            an error (arXiv 2601.20829, 2605.05112).
    """

    follows_success = True

    def __init__(
        self,
        target: float = 0.5,
        spread: float = 0.1,
        highest: float = 0.95,
        plain_share: float = 0.1,
        failing_prefixes: bool = False,
    ) -> None:
        if not 0 < target < 1 or not 0 <= spread < min(target, 1 - target):
            raise ConfigurationError(
                f"cache.cut needs target ± spread within (0, 1), got target={target}, spread={spread}"
            )
        self.target = target
        self.spread = spread
        self.highest = require_highest(highest)
        self.plain_share = require_plain_share(plain_share)
        self.failing_prefixes = failing_prefixes
        self.cuts_wrong = failing_prefixes

    def anchor(self, entry: CacheEntry, rng: np.random.Generator) -> CachedResponse | None:
        """A correct response, or a wrong one for a question that is solved more often than the target."""
        if self.failing_prefixes:
            length = _correct_length(entry)
            solved = self._predictor(entry).success(0.0, True, length, entry.state)
            if solved > self.target:
                return one_of([anchor for anchor in entry.anchors if not anchor.correct], rng)
        return a_correct_anchor(entry, rng)

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """The predicted share of the response."""
        target = float(rng.uniform(self.target - self.spread, self.target + self.spread))
        share = self._predictor(entry).kept_share(target, response.correct, _correct_length(entry), entry.state)
        return int(min(share, self.highest) * len(response))

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:
        """Update the predictor and the question's correction."""
        self._predictor(entry).observe(
            outcome.kept_share,
            outcome.cached_correct,
            _correct_length(entry),
            entry.state,
            successes=sum(outcome.correct),
            members=len(outcome.correct),
        )

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """Level and variance are finite numbers."""
        return question_problem(state)

    def shared_problem(self, shared: Mapping[str, Any]) -> str | None:
        """The predictor's coefficients are finite numbers, as many as it has."""
        return None if "success" not in shared else memory_problem(shared["success"])

    def _predictor(self, entry: CacheEntry) -> SuccessPredictor:
        return SuccessPredictor(entry.shared.setdefault("success", {}))


class BisectionCut(CutStrategy):
    """AdaBack's interval rule (arXiv 2506.18110): keep more of a correct response after failure, less after success.

    The share is drawn uniformly from the question's interval. After a group whose success is below ``threshold``, the
    interval reaches from the share that was kept up to the smallest share that has succeeded so far, or ``highest`` if
    none has. After any other group, it reaches from 0 to the smallest share that has succeeded. So its upper end never
    rises, even if a kept share lies above it (a cut moved to the end of a step, a question with several groups in an
    iteration). A question that has not been cut yet takes the moving averages of the ends of the intervals, of which
    each iteration has a fifth.

    Deviations: success is the share of correct members, not the mean reward, which may have other terms. A group
    without a prefix changes the interval only if it succeeds: its failure says no more than that 0 is too short.

    Args:
        threshold: The success (τ) below which more is kept, in (0, 1]. The published code has 0.5 by default.
        highest: Largest share, and the upper end of every interval at first.
        plain_share: Share of the visits that start without a prefix.
    """

    # Weight of the earlier moving average.
    smoothing = 0.8
    follows_success = True

    def __init__(self, threshold: float = 0.5, highest: float = 0.9, plain_share: float = 0.1) -> None:
        if not 0 < threshold <= 1:
            raise ConfigurationError(f"cache.cut.threshold must lie in (0, 1], got {threshold}")
        self.threshold = threshold
        self.highest = require_highest(highest)
        self.plain_share = require_plain_share(plain_share)

    def anchor(self, entry: CacheEntry, rng: np.random.Generator) -> CachedResponse | None:
        """A correct response."""
        return a_correct_anchor(entry, rng)

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """A random share from the question's interval, or from that of new questions."""
        low, high = entry.state.get("interval") or self._shared(entry.shared)["interval"]
        return int(rng.uniform(low, high) * len(response))

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:
        """Move the question's interval."""
        share, has_succeeded = outcome.kept_share, outcome.success >= self.threshold
        if not outcome.prefix_length and not has_succeeded:
            return
        smallest = entry.state["interval"][1] if "interval" in entry.state else self.highest
        share = min(share, smallest)
        interval = [0.0, share] if has_succeeded else [share, smallest]
        entry.state["interval"] = interval
        self._shared(entry.shared)["of_iteration"].append(interval)

    def end_iteration(self, cache: ExperienceCache) -> None:
        """Average the new intervals into that of new questions."""
        shared = self._shared(cache.shared)
        moved = shared["of_iteration"]
        if moved:
            means = [sum(ends) / len(moved) for ends in zip(*moved, strict=True)]
            shared["interval"] = [
                self.smoothing * old + (1 - self.smoothing) * new
                for old, new in zip(shared["interval"], means, strict=True)
            ]
            shared["of_iteration"] = []

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """An interval has two ends in [0, 1]."""
        return _interval_problem(state["interval"]) if "interval" in state else None

    def shared_problem(self, shared: Mapping[str, Any]) -> str | None:
        """Likewise the interval of new questions, and those of an iteration."""
        mine = shared.get("bisection", {"interval": [0, 1], "of_iteration": []})
        if not isinstance(mine, Mapping) or not isinstance(mine.get("of_iteration"), list):
            return "bisection is no object with interval and of_iteration"
        intervals = [mine.get("interval"), *mine["of_iteration"]]
        return next((problem for i in intervals if (problem := _interval_problem(i)) is not None), None)

    def _shared(self, notes: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {"interval": [0.0, self.highest], "of_iteration": []}
        mine: dict[str, Any] = notes.setdefault("bisection", new)
        return mine


def require_highest(highest: float) -> float:
    """Check the largest share that a strategy keeps.

    Raises:
        ConfigurationError: It does not lie in (0, 1).
    """
    if not 0 < highest < 1:
        raise ConfigurationError(f"cache.cut.highest must lie in (0, 1), got {highest}")
    return highest


def _interval_problem(interval: Any) -> str | None:
    is_one = isinstance(interval, list) and len(interval) == 2 and all(is_number(end, 0, 1) for end in interval)
    return None if is_one else f"interval is {str(interval)[:40]!r}"


def _correct_length(entry: CacheEntry) -> int | None:
    """Tokens of the question's first correct response."""
    first = entry.first_correct
    return None if first is None else len(first)
