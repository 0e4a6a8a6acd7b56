"""Cut strategies: how much of a cached response is kept.

A strategy looks at a question's entry and says how many tokens of its response to keep. After the group has been
scored it is told the outcome, and may remember something in ``entry.state``, which is saved with the entry. Everything
else (clamping, the suffix budget, starting over) is done around it, so a new strategy is one small class.

Paper (eqs. 3, 4): the last m ~ U{0, …, L} tokens are dropped. Deviation: at least one token is always regenerated,
since a kept end-of-sequence token would leave nothing to generate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpo_lightning.cache.cache import CachedResponse, CacheEntry
from rpo_lightning.core.errors import ConfigurationError


@dataclass(frozen=True)
class GroupOutcome:
    """What came of a cut.

    Attributes:
        prefix_length: Tokens of the prefix; 0 means that the group took the full path.
        cut: Tokens of the cached response that had been dropped; 0 where there was no response.
        rewards: Total rewards of the members.
        correct: The verifier's verdicts.
        lengths: Whole response lengths in tokens.
    """

    prefix_length: int
    cut: int
    rewards: Sequence[float]
    correct: Sequence[bool]
    lengths: Sequence[int]


class CutStrategy(ABC):
    """Decides how much of a cached response is kept."""

    @abstractmethod
    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Tokens to keep from the front of ``response``: the length of the prefix.

        Args:
            entry: The question's entry, with whatever the strategy stored in its ``state``.
            response: ``entry.response``, which is there.
            rng: Seeded by run, question and visit, so that a visit resolves the same way everywhere.
        """

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:  # noqa: B027 (optional hook)
        """Learn the outcome of a group, full-path groups included."""


class UniformCut(CutStrategy):
    """Drop m ~ U{0, …, L} tokens with a fixed L (the paper's RPO-300, -500 and -800).

    Args:
        max_cut: L, in tokens.
    """

    def __init__(self, max_cut: int) -> None:
        if max_cut < 1:
            raise ConfigurationError(f"cache.cut.max_cut must be at least 1 token, got {max_cut}")
        self.max_cut = max_cut

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Length minus a uniform draw; nothing where the draw exceeds the length."""
        return max(0, len(response) - int(rng.integers(0, self.max_cut + 1)))


class FractionOfShortestCut(CutStrategy):
    """Drop m ~ U{0, …, fraction · ℓ}, with ℓ the shortest response of the question's last group.

    Equation 4 of the paper with ``fraction`` = 1/2, its main setting. The group being sampled has no
    lengths yet, so ℓ is the previous group's, and before that the cached response's own length.

    Args:
        fraction: Share of ℓ that may be dropped, in (0, 1].
    """

    def __init__(self, fraction: float = 0.5) -> None:
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"cache.cut.fraction must lie in (0, 1], got {fraction}")
        self.fraction = fraction

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Length minus a uniform draw up to the share of ℓ."""
        shortest = entry.state.get("shortest_length", len(response))
        return max(0, len(response) - int(rng.integers(0, int(self.fraction * shortest) + 1)))

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:
        """Remember ℓ."""
        entry.state["shortest_length"] = min(outcome.lengths)


class AnchoredCut(CutStrategy):
    """Keep a share f ~ U(low, high) of a *correct* response; no prefix where there is none.

    Not in the paper. A cut in the middle of a correct response keeps the group's outcome open, where
    a wrong prefix decides it and a late cut leaves little to decide. Goes with the
    ``CorrectMemberRefresh``, which only ever caches correct responses.

    Args:
        low: Smallest share kept.
        high: Largest share kept.
    """

    def __init__(self, low: float = 0.1, high: float = 0.6) -> None:
        if not 0 <= low <= high < 1:
            raise ConfigurationError(f"cut needs 0 <= low <= high < 1, got low={low}, high={high}")
        self.low = low
        self.high = high

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """A random share of a correct response, or nothing."""
        if not response.correct:
            return 0
        return int(rng.uniform(self.low, self.high) * len(response))
