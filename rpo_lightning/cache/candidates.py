"""Members of a scored group as responses to cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rpo_lightning.cache.cache import CachedResponse, CacheEntry
from rpo_lightning.cache.draws import question_generator
from rpo_lightning.cache.refresh import RefreshRule
from rpo_lightning.cache.spans import extend_spans
from rpo_lightning.core.seeds import SeedPurpose
from rpo_lightning.core.types import Group


def candidates(group: Group, keep_unfinished: bool) -> list[int]:
    """Indices of the members that may be cached."""
    return [i for i, c in enumerate(group.completions) if c.finished or keep_unfinished]


def cached_response(group: Group, member: int) -> CachedResponse:
    """A member's response in the form that the cache holds."""
    completion = group.completions[member]
    return CachedResponse(
        token_ids=np.asarray(group.response_ids(member), dtype=np.int32),
        reward=group.rewards[member],
        correct=group.samples[member].is_correct,
        finished=completion.finished,
        spans=extend_spans(group.request.prefix_spans, len(completion.token_ids), group.step),
    )


def initial_responses(group: Group, keep_unfinished: bool) -> Iterator[CachedResponse]:
    """The candidates of a group, the best first, with ties for the best broken at random."""
    members = candidates(group, keep_unfinished)
    if not members:
        return
    top = max(group.rewards[i] for i in members)
    rng = question_generator(SeedPurpose.INITIAL_CHOICE, group.request.prompt.uid, 0)
    best = int(rng.choice([i for i in members if group.rewards[i] == top]))
    yield cached_response(group, best)
    for member in sorted((i for i in members if i != best), key=lambda i: -group.rewards[i]):
        yield cached_response(group, member)


def best_responses(group: Group, refresh: RefreshRule, keep_unfinished: bool) -> list[CachedResponse]:
    """What a group leaves in an empty entry: its best candidates, as many as the refresh rule keeps.

    Args:
        group: The scored group.
        refresh: Says how many responses are kept.
        keep_unfinished: Whether responses that ran out of budget are candidates.
    """
    return list(refresh.fill([], initial_responses(group, keep_unfinished)).values())


def fill(entry: CacheEntry, refresh: RefreshRule, responses: Iterable[CachedResponse]) -> None:
    """Cache responses in the empty slots of an entry, as many as the refresh rule keeps.

    Args:
        entry: The question's entry.
        refresh: Says which slots there are.
        responses: The best first.
    """
    for slot, response in refresh.fill(entry.slots, responses).items():
        entry.remember(response, slot)
