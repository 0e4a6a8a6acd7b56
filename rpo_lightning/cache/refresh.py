"""Refresh rules: which member of a group replaces the cached response.

Paper (section 3.3, eq. 10): the best member with probability ε, otherwise one of the others at random. Deviations:
ties for the best are broken at random, and unfinished responses are candidates only with ``cache.keep_unfinished``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from rpo_lightning.cache.responses import CachedResponse
from rpo_lightning.cache.soundness import MOST_SLOTS
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Group


class RefreshRule(ABC):
    """Chooses the members of a scored group that are cached, and the anchors that they replace.

    Attributes:
        slots: How many responses of a question the rule keeps.
        keeps_wrong: Whether it keeps wrong responses on purpose, to cut failing prefixes from.
    """

    slots = 1
    keeps_wrong = False

    @abstractmethod
    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        """The indices of the members to cache; empty to leave the entry as it is.

        Args:
            group: The scored group.
            candidates: Indices of the members that may be cached; may be empty.
            rng: Seeded by run, question and visit.
        """

    def slot(self, anchors: Sequence[CachedResponse | None], response: CachedResponse, prefer_own: bool) -> int | None:
        """The slot in which a response is cached; ``None`` if it is not.

        Asked for every response that ``choose`` picks, whatever its group's rewards are. This one knows one slot,
        whose response is always replaced, a trace only with ``prefer_own``.

        Args:
            anchors: What the question's slots hold.
            response: The response to cache.
            prefer_own: Whether a response of this run may replace a trace.
        """
        anchor = anchors[0] if anchors else None
        return 0 if prefer_own or anchor is None or not anchor.is_trace else None

    def fill(
        self, anchors: Sequence[CachedResponse | None], responses: Iterable[CachedResponse]
    ) -> dict[int, CachedResponse]:
        """Responses for the empty slots of a question, the first ones first.

        Args:
            anchors: What the question's slots hold.
            responses: Responses to it, the best first. None is taken once as many are held as the rule keeps.
        """
        slots = list(anchors)
        found: dict[int, CachedResponse] = {}
        left = iter(responses)
        while sum(anchor is not None for anchor in slots) < self.slots and (response := next(left, None)) is not None:
            slot = self.slot(slots, response, prefer_own=True)
            slots += [None] * (0 if slot is None else slot + 1 - len(slots))
            if slot is not None and slots[slot] is None:
                slots[slot] = found[slot] = response
        return found


class EpsilonGreedyRefresh(RefreshRule):
    """The best member with probability ε, otherwise one of the others at random (eq. 10).

    Args:
        epsilon: Probability of caching the best member; with 1, always the best.
    """

    def __init__(self, epsilon: float = 0.5) -> None:
        if not 0 <= epsilon <= 1:
            raise ConfigurationError(f"cache.refresh.epsilon must lie in [0, 1], got {epsilon}")
        self.epsilon = epsilon

    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> list[int]:
        """The best candidate or, with probability 1 - ε, another one."""
        if not candidates:
            return []
        top = max(group.rewards[i] for i in candidates)
        best = int(rng.choice([i for i in candidates if group.rewards[i] == top]))
        others = [i for i in candidates if i != best]
        if not others or rng.random() <= self.epsilon:
            return [best]
        return [int(rng.choice(others))]


class CorrectMemberRefresh(RefreshRule):
    """A random correct member. Without one, the entry stays as it is.

    Not in the paper. Use it with ``AnchoredCut``.
    """

    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> list[int]:
        """A random correct candidate, if there is one."""
        return _one_of([i for i in candidates if group.samples[i].is_correct], rng)


class AnchorsRefresh(RefreshRule):
    """Several anchors for each question: a random correct member and a random wrong one of each group.

    Not in the paper. While there is an empty slot for its verdict, a member fills it. After that it replaces the anchor
    of its verdict whose last tokens are oldest. A member that this run generated as a whole replaces one with tokens
    from elsewhere first. One that continues a prefix from elsewhere never replaces an anchor without such tokens.

    A cache that another rule has filled may hold more wrong anchors than this one keeps. Correct members replace those
    first. A wrong member never replaces a correct anchor.

    Args:
        correct: How many correct responses to keep, at least 1.
        wrong: How many wrong ones to keep, for failing prefixes (``TargetSuccessCut.failing_prefixes``).
    """

    def __init__(self, correct: int = 1, wrong: int = 1) -> None:
        if correct < 1 or wrong < 0 or correct + wrong > MOST_SLOTS:
            raise ConfigurationError(
                f"cache.refresh needs correct >= 1 and wrong >= 0 anchors, {MOST_SLOTS} at most in all; got "
                f"correct={correct}, wrong={wrong}"
            )
        self.correct = correct
        self.wrong = wrong
        self.slots = correct + wrong
        self.keeps_wrong = wrong > 0

    def choose(self, group: Group, candidates: Sequence[int], rng: np.random.Generator) -> list[int]:
        """A random correct candidate and a random wrong one, where there are such."""
        right = _one_of([i for i in candidates if group.samples[i].is_correct], rng)
        wrong = [i for i in candidates if not group.samples[i].is_correct] if self.keeps_wrong else []
        return [*right, *_one_of(wrong, rng)]

    def slot(self, anchors: Sequence[CachedResponse | None], response: CachedResponse, prefer_own: bool) -> int | None:
        """An empty slot while there are too few anchors of the verdict, or else that of the one to replace."""
        wrong = {i: a for i, a in enumerate(anchors) if a is not None and not a.correct}
        if response.correct and len(wrong) > self.wrong:
            return min(wrong, key=lambda i: wrong[i].step)
        if not response.correct and not self.keeps_wrong:
            return None
        same = {i: a for i, a in enumerate(anchors) if a is not None and a.correct == response.correct}
        if len(same) < (self.correct if response.correct else self.wrong):
            return next((i for i, anchor in enumerate(anchors) if anchor is None), len(anchors))
        replaceable = {
            i: a for i, a in same.items() if (prefer_own or not a.is_trace) and (response.is_own or not a.is_own)
        }
        # An own response looks for one from elsewhere first. Ties go to the first slot.
        return min(replaceable, key=lambda i: (replaceable[i].is_own, replaceable[i].step), default=None)


def _one_of(members: list[int], rng: np.random.Generator) -> list[int]:
    return [int(rng.choice(members))] if members else []
