"""From cached responses to prefixes and back: RPO's use of the cache, without Lightning.

:class:`CachedPrefixes` is the whole of what RPO adds to GRPO or DAPO: ``request`` turns a prompt into
a rollout request that starts from a kept prefix, ``record`` takes a scored group back into the cache.
Random draws are seeded by run, question and visit, so that they depend neither on the order of
questions nor on the process, and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rpo_lightning.cache.budgets import SuffixBudget
from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, GroupOutcome
from rpo_lightning.cache.refresh import RefreshRule
from rpo_lightning.cache.spans import cut_spans, extend_spans
from rpo_lightning.core.errors import CacheError, ConfigurationError
from rpo_lightning.core.hashing import stable_hash
from rpo_lightning.core.seeds import SeedPurpose, derive_generator
from rpo_lightning.core.types import Group, Prompt, RolloutRequest, full_path_request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheUpdate:
    """What becomes of an entry after a group, in the form that travels between ranks.

    Attributes:
        uid: The question.
        response: What is cached from now on; ``None`` leaves the response as it is.
        outcome: What the cut strategy is told.
    """

    uid: str
    response: CachedResponse | None
    outcome: GroupOutcome


class CachedPrefixes:
    """Serves kept prefixes from an experience cache and refreshes it.

    Args:
        cache: The cache.
        cut: How much of a response is kept.
        budget: How long a suffix may get.
        refresh: Which member of a group is cached.
        response_limit: Limit of a whole response in tokens.
        on_failure: What a group without a correct member means for the question's next visit:
            ``keep`` cuts the entry again (paper), ``restart`` starts without a prefix.
        keep_unfinished: Whether responses that ran out of budget may be cached.
    """

    def __init__(
        self,
        cache: ExperienceCache,
        cut: CutStrategy,
        budget: SuffixBudget,
        refresh: RefreshRule,
        response_limit: int,
        on_failure: Literal["keep", "restart"] = "keep",
        keep_unfinished: bool = False,
    ) -> None:
        self.cache = cache
        self.cut = cut
        self.budget = budget
        self.refresh = refresh
        self.response_limit = response_limit
        self.on_failure = on_failure
        self.keep_unfinished = keep_unfinished

    def request(self, prompt: Prompt) -> RolloutRequest:
        """Pair a prompt with a kept prefix and a suffix budget.

        A question without a cached response, or one that is to start over, takes the full path.

        Raises:
            ConfigurationError: The budget leaves no token to generate.
        """
        entry = self.cache.get(prompt.uid)
        if entry is None or entry.response is None or entry.restart:
            return full_path_request(prompt, self.response_limit)
        response = entry.response
        prefix_length = min(drawn_prefix(self.cut, entry, response), self.response_limit - 1)
        if prefix_length == 0:
            return full_path_request(prompt, self.response_limit)
        cut = len(response) - prefix_length
        tokens = min(self.budget.tokens(prefix_length, cut, self.response_limit), self.response_limit - prefix_length)
        if tokens < 1:
            raise ConfigurationError(
                f"{type(self.budget).__name__} gives question {prompt.uid} a suffix budget of {tokens} tokens "
                f"(prefix {prefix_length}, cut {cut}): budgets must be at least 1"
            )
        return RolloutRequest(
            prompt=prompt,
            prefix_ids=tuple(response.token_ids[:prefix_length].tolist()),
            max_new_tokens=tokens,
            cached_length=len(response),
            prefix_spans=cut_spans(response.spans, prefix_length),
        )

    def record(self, group: Group) -> None:
        """Take a scored group into the cache."""
        self.apply(self.update_from(group))

    def update_from(self, group: Group) -> CacheUpdate:
        """What a scored group means for its question's entry, which is left as it is."""
        request, uid = group.request, group.request.prompt.uid
        entry = self.cache.get(uid)
        visits = 0 if entry is None else entry.visits
        chosen = self.refresh.choose(
            group, self._candidates(group), question_generator(SeedPurpose.REFRESH, uid, visits)
        )
        return CacheUpdate(
            uid=uid,
            response=None if chosen is None else cached_response(group, chosen),
            outcome=GroupOutcome(
                prefix_length=len(request.prefix_ids),
                cut=request.cut,
                rewards=group.rewards,
                correct=[sample.is_correct for sample in group.samples],
                lengths=group.lengths,
            ),
        )

    def apply(self, update: CacheUpdate) -> None:
        """Refresh an entry and tell the cut strategy.

        Of several updates of one question each is applied, so that the last one's response stays: ranks that
        apply the same updates in the same order have the same cache.
        """
        entry = self.cache.entry(update.uid)
        if update.response is not None:
            self.cache.remember(update.uid, update.response)
        entry.visits += 1
        entry.restart = self.on_failure == "restart" and not any(update.outcome.correct)
        self.cut.observe(entry, update.outcome)

    def initial_update(self, group: Group) -> tuple[str, CachedResponse | None]:
        """A question and what to cache of a group of the starting policy: its best candidate (eq. 1)."""
        return group.request.prompt.uid, initial_response(group, self.keep_unfinished)

    def initialise(self, uid: str, response: CachedResponse | None) -> None:
        """Fill an entry before training."""
        if response is None:
            self.cache.entry(uid)
        else:
            self.cache.remember(uid, response)

    def _candidates(self, group: Group) -> list[int]:
        return _candidates(group, self.keep_unfinished)


def drawn_prefix(cut: CutStrategy, entry: CacheEntry, response: CachedResponse) -> int:
    """Tokens of an entry's response that a cut keeps at the next visit; at least one is always regenerated."""
    prefix_length = cut.prefix_length(entry, response, question_generator(SeedPurpose.CUT, entry.uid, entry.visits))
    return max(min(prefix_length, len(response) - 1), 0)


def require_same_questions(cache: ExperienceCache, prompts: list[Prompt], where: str | Path) -> None:
    """Check that a cache belongs to a data set.

    Raises:
        CacheError: None of the questions is in it.
    """
    known = sum(p.uid in cache for p in prompts)
    if len(cache) and not known:
        raise CacheError(
            f"{where}: made for another data set, none of its {len(cache)} questions is among the {len(prompts)} "
            "training questions; build a new cache, or set data.uid_column as it was then"
        )
    if known < len(prompts):
        log.info(f"{where}: knows {known} of {len(prompts)} training questions")


def initial_response(group: Group, keep_unfinished: bool) -> CachedResponse | None:
    """The best candidate of a group, drawn among equals; ``None`` if there is none."""
    candidates = _candidates(group, keep_unfinished)
    if not candidates:
        return None
    top = max(group.rewards[i] for i in candidates)
    rng = question_generator(SeedPurpose.INITIAL_CHOICE, group.request.prompt.uid, 0)
    return cached_response(group, int(rng.choice([i for i in candidates if group.rewards[i] == top])))


def cached_response(group: Group, member: int) -> CachedResponse:
    """A member of a group in the form that is cached."""
    completion = group.completions[member]
    return CachedResponse(
        token_ids=np.asarray(group.response_ids(member), dtype=np.int32),
        reward=group.rewards[member],
        correct=group.samples[member].is_correct,
        finished=completion.finished,
        spans=extend_spans(group.request.prefix_spans, len(completion.token_ids), group.step),
    )


def question_generator(purpose: SeedPurpose, uid: str, visit: int) -> np.random.Generator:
    """The generator of the run for a visit of a question."""
    return derive_generator(purpose, stable_hash(uid), visit)


def _candidates(group: Group, keep_unfinished: bool) -> list[int]:
    return [i for i, c in enumerate(group.completions) if c.finished or keep_unfinished]
