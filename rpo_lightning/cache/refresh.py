"""Refresh rules: which member of a group replaces the cached response.

Paper (section 3.3, eq. 10): the best member with probability ε, otherwise one of the others at random. Deviations:
ties for the best are broken at random, and unfinished responses are candidates only with ``cache.keep_unfinished``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Group


class RefreshRule(ABC):
    """Chooses the member of a scored group that is cached."""

    @abstractmethod
    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> int | None:
        """The index of the member to cache, or ``None`` to leave the entry as it is.

        Args:
            group: The scored group.
            candidates: Indices of the members that may be cached; may be empty.
            rng: Seeded by run, question and visit.
        """


class EpsilonGreedyRefresh(RefreshRule):
    """The best member with probability ε, otherwise one of the others at random (eq. 10).

    Args:
        epsilon: Probability of caching the best member; with 1, always the best.
    """

    def __init__(self, epsilon: float = 0.5) -> None:
        if not 0 <= epsilon <= 1:
            raise ConfigurationError(f"cache.refresh.epsilon must lie in [0, 1], got {epsilon}")
        self.epsilon = epsilon

    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> int | None:
        """The best candidate or, with probability 1 - ε, another one."""
        if not candidates:
            return None
        top = max(group.rewards[i] for i in candidates)
        best = int(rng.choice([i for i in candidates if group.rewards[i] == top]))
        others = [i for i in candidates if i != best]
        if not others or rng.random() <= self.epsilon:
            return best
        return int(rng.choice(others))


class CorrectMemberRefresh(RefreshRule):
    """A random correct member. Without one, the entry stays as it is.

    Not in the paper. Use it with ``AnchoredCut``.
    """

    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> int | None:
        """A random correct candidate, or ``None``."""
        correct = [i for i in candidates if group.samples[i].is_correct]
        return int(rng.choice(correct)) if correct else None
