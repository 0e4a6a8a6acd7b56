"""Cut strategies: which cached response is cut, and how many of its tokens become the prefix.

To write one, subclass ``CutStrategy`` and return the prefix length for a question's entry. To learn from scored
groups, override ``observe``. Keep notes on a question in ``entry.state`` and notes on all questions in
``entry.shared``. Both are saved with the cache. The caller (``rpo_lightning.cache.prefixes``) clamps the length,
moves it to the end of a step, sets the suffix budget and restarts questions.

Paper (eqs. 3, 4): the last m ~ U{0, …, L} tokens are dropped. Deviation: at least one token is always sampled again,
because nothing can follow an end-of-sequence token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.soundness import is_number
from rpo_lightning.core.errors import CacheError, ConfigurationError


@dataclass(frozen=True)
class GroupOutcome:
    """The result of a cut: a scored group as cut strategies see it.

    Attributes:
        prefix_length: Tokens of the prefix; 0 on the full path.
        cut: Tokens dropped from the end of the cached response; 0 if there was no response.
        rewards: Total reward of each member.
        correct: The verifier's verdict on each member.
        lengths: Length of each member's whole response in tokens.
        cached_correct: Whether the cached response is correct; true if there was no response.
    """

    prefix_length: int
    cut: int
    rewards: Sequence[float]
    correct: Sequence[bool]
    lengths: Sequence[int]
    cached_correct: bool = True

    @property
    def kept_share(self) -> float:
        """Share of the cached response that was kept; 0 on the full path."""
        return self.prefix_length / (self.prefix_length + self.cut) if self.prefix_length else 0.0

    @property
    def success(self) -> float:
        """Share of the members that are correct."""
        return sum(self.correct) / len(self.correct)


class CutStrategy(ABC):
    """Decides how many tokens of a cached response become the prefix.

    Attributes:
        plain_share: Share of the visits that start without a prefix, whatever the cache holds.
        cuts_wrong: Whether it cuts failing prefixes from wrong responses, if the cache keeps some.
        follows_success: Whether it answers a failed group by keeping more.
    """

    plain_share = 0.0
    cuts_wrong = False
    follows_success = False

    def anchor(self, entry: CacheEntry, rng: np.random.Generator) -> CachedResponse | None:
        """The response to cut at a visit; ``None`` for no prefix.

        This one is the response in slot 0, right or wrong, however many the refresh rule keeps.

        Args:
            entry: The question's entry.
            rng: As in ``prefix_length``, which draws after it.
        """
        return entry.response

    @abstractmethod
    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Length of the prefix: the number of tokens to keep from the start of ``response``.

        Args:
            entry: The question's entry, with the strategy's notes in ``state`` and ``shared``.
            response: What ``anchor`` returned, never ``None``.
            rng: Seeded by run, question and visit: a visit draws the same on every rank and after a resume.
        """

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:  # noqa: B027 (optional hook)
        """Learn the outcome of a group. Called for full-path groups too, on all ranks in the same order."""

    def end_iteration(self, cache: ExperienceCache) -> None:  # noqa: B027 (optional hook)
        """Learn from an iteration as a whole, after its groups have been observed."""

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """Why saved notes on a question cannot be this strategy's; ``None`` if they can. Others' notes are ignored."""
        return None

    def shared_problem(self, shared: Mapping[str, Any]) -> str | None:
        """Why saved notes on all questions cannot be this strategy's, like ``state_problem``."""
        return None


def require_usable_notes(cut: CutStrategy, cache: ExperienceCache, where: str) -> None:
    """Check the notes of a saved cache. Those that a strategy cannot use would fail in the middle of a run.

    Args:
        cut: The run's strategy.
        cache: The cache.
        where: What to call it in the message.

    Raises:
        CacheError: The strategy cannot use its notes.
    """
    of_entries = ((f"question {uid}", cut.state_problem(state)) for uid, state in cache.states())
    for whose, problem in chain([("all questions", cut.shared_problem(cache.shared))], of_entries):
        if problem is not None:
            name = type(cut).__name__
            raise CacheError(
                f"{where}: what {name} noted on {whose} cannot be used ({problem}): build a new cache, or use another "
                "cache.cut"
            )


def a_correct_anchor(entry: CacheEntry, rng: np.random.Generator) -> CachedResponse | None:
    """A correct response of a question, a random one of several."""
    return one_of([anchor for anchor in entry.anchors if anchor.correct], rng)


def one_of(anchors: list[CachedResponse], rng: np.random.Generator) -> CachedResponse | None:
    """A random one of several responses. Draws nothing if there is no choice."""
    if len(anchors) > 1:
        return anchors[int(rng.integers(len(anchors)))]
    return anchors[0] if anchors else None


def require_plain_share(plain_share: float) -> float:
    """Check a strategy's ``plain_share``.

    Raises:
        ConfigurationError: It does not lie in [0, 1).
    """
    if not 0 <= plain_share < 1:
        raise ConfigurationError(f"cache.cut.plain_share must lie in [0, 1), got {plain_share}")
    return plain_share


class UniformCut(CutStrategy):
    """Drop m ~ U{0, …, L} tokens with a fixed L (the paper's RPO-300, -500 and -800).

    Of several responses to a question it cuts the one in slot 0 only.

    Args:
        max_cut: L, in tokens.
    """

    def __init__(self, max_cut: int) -> None:
        if max_cut < 1:
            raise ConfigurationError(f"cache.cut.max_cut must be at least 1 token, got {max_cut}")
        self.max_cut = max_cut

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Response length minus a uniform draw; 0 if the draw is larger."""
        return max(0, len(response) - int(rng.integers(0, self.max_cut + 1)))


class FractionOfShortestCut(CutStrategy):
    """Drop m ~ U{0, …, fraction · ℓ} tokens; ℓ is the shortest response of the question's previous group.

    ``fraction`` = 1/2 is equation 4 of the paper, its main setting. Before a question's first group, ℓ is the length of
    the cached response. Of several responses to a question it cuts the one in slot 0 only.

    Args:
        fraction: Share of ℓ that may be dropped, in (0, 1].
    """

    def __init__(self, fraction: float = 0.5) -> None:
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"cache.cut.fraction must lie in (0, 1], got {fraction}")
        self.fraction = fraction

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """Response length minus a uniform draw from 0 to ``fraction · ℓ``."""
        shortest = entry.state.get("shortest_length", len(response))
        return max(0, len(response) - int(rng.integers(0, int(self.fraction * shortest) + 1)))

    def observe(self, entry: CacheEntry, outcome: GroupOutcome) -> None:
        """Store ℓ in the entry's state."""
        entry.state["shortest_length"] = min(outcome.lengths)

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """ℓ is a number of tokens."""
        shortest = state.get("shortest_length", 0)
        return None if is_number(shortest, 0) else f"shortest_length is {str(shortest)[:40]!r}"


class AnchoredCut(CutStrategy):
    """Keep a share f ~ U(low, high) of a correct response. A wrong response gives no prefix.

    Not in the paper. After a cut in the middle of a correct response, members can still end right or wrong. A wrong
    prefix or a late cut mostly decides that beforehand. Use it with ``CorrectMemberRefresh``, which caches correct
    responses only. Of several correct responses to a question, each visit cuts a random one.

    Args:
        low: Smallest share of the response that becomes the prefix.
        high: Largest share, below 1.
        plain_share: Share of the visits that start without a prefix. Late cuts need some: otherwise the openings of
            responses are never practised.
    """

    def __init__(self, low: float = 0.1, high: float = 0.6, plain_share: float = 0.0) -> None:
        if not 0 <= low <= high < 1:
            raise ConfigurationError(f"cache.cut needs 0 <= low <= high < 1, got low={low}, high={high}")
        self.low = low
        self.high = high
        self.plain_share = require_plain_share(plain_share)

    def anchor(self, entry: CacheEntry, rng: np.random.Generator) -> CachedResponse | None:
        """A correct response."""
        return a_correct_anchor(entry, rng)

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """A random share of a correct response; 0 for a wrong one."""
        if not response.correct:
            return 0
        return int(rng.uniform(self.low, self.high) * len(response))
