"""What is drawn at a visit of a question: the cached response that is cut, and where.

Draws are seeded by run, question and visit.
"""

from __future__ import annotations

import numpy as np

from rpo_lightning.cache.cache import CachedResponse, CacheEntry
from rpo_lightning.cache.cuts import CutStrategy
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.core.hashing import stable_hash
from rpo_lightning.core.seeds import SeedPurpose, derive_generator


def drawn_prefix(
    cut: CutStrategy, entry: CacheEntry, steps: StepEnds | None = None, response_limit: int | None = None
) -> tuple[CachedResponse | None, int]:
    """The response that an entry's next visit cuts, and the length of the prefix.

    At least one token of the response is always sampled again, and one has room below the response limit.

    Args:
        cut: The cut strategy.
        entry: The question's entry.
        steps: Where cuts may lie; anywhere if not given.
        response_limit: Limit of a whole response in tokens; none if not given.
    """
    rng = question_generator(SeedPurpose.CUT, entry.uid, entry.visits)
    if cut.plain_share and rng.random() < cut.plain_share:
        return None, 0
    response = cut.anchor(entry, rng)
    if response is None:
        return None, 0
    longest = min(len(response), response_limit or len(response)) - 1
    prefix_length = max(min(cut.prefix_length(entry, response, rng), longest), 0)
    if steps is not None and prefix_length:
        prefix_length = steps.nearest(response.token_ids[:longest], prefix_length)
    return response, prefix_length


def question_generator(purpose: SeedPurpose, uid: str, visit: int) -> np.random.Generator:
    """The run's generator for a purpose at a visit of a question."""
    return derive_generator(purpose, stable_hash(uid), visit)
