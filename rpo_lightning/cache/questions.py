"""A cache and the training questions: whether it belongs to them, and which of them it knows without a response."""

from __future__ import annotations

import logging
from pathlib import Path

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.types import Prompt

log = logging.getLogger(__name__)

# Questions that are named where many are told of.
_NAMED = 5


def require_same_questions(cache: ExperienceCache, prompts: list[Prompt], where: str | Path) -> None:
    """Check that a cache belongs to the training questions. Logs how many it knows, if not all.

    Args:
        cache: The cache.
        prompts: The training questions.
        where: What to call the cache in messages.

    Raises:
        CacheError: The cache has entries, and none is of these questions.
    """
    known = sum(p.uid in cache for p in prompts)
    if len(cache) and not known:
        raise CacheError(
            f"{where}: made for another data set, none of its {len(cache)} questions is among the {len(prompts)} "
            "training questions: build a new cache, or set data.uid_column as for the run that made it"
        )
    if known < len(prompts):
        log.info(f"{where}: has entries for {known} of {len(prompts)} training questions")


def tell_of_second_answers(cache: ExperienceCache, prompts: list[Prompt], where: str | Path) -> None:
    """Log which questions a cache knows without a response: their earlier answers could not be cached.

    Args:
        cache: The cache.
        prompts: The training questions.
        where: What to call the cache in the message.
    """
    again = [p.uid for p in prompts if p.uid in cache and not cache.has_anchor(p.uid)]
    if again:
        some = ", ".join(again[:_NAMED]) + (", …" if len(again) > _NAMED else "")
        log.info(f"{where}: has no response to {len(again)} of its questions, which are answered again: {some}")
