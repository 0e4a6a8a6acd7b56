"""RPO's use of the experience cache: prefixes from cached responses, cached responses from scored groups.

:class:`CachedPrefixes` is all that RPO adds to GRPO or DAPO. ``request`` turns a prompt into a rollout request with a
prefix. ``record`` refreshes the cache from a scored group. Draws are seeded by run, question and visit. They depend
neither on the order of the questions nor on the rank, and a resumed run draws what the uninterrupted run would have
drawn.
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
    """A change to one entry after a scored group, in the form that ranks exchange.

    Attributes:
        uid: The question.
        response: The response to cache; ``None`` leaves the cached one as it is.
        outcome: The outcome for the cut strategy.
    """

    uid: str
    response: CachedResponse | None
    outcome: GroupOutcome


class CachedPrefixes:
    """Cuts prefixes from an experience cache and refreshes the cache.

    Args:
        cache: The cache.
        cut: How long a prefix is.
        budget: How long a suffix may be.
        refresh: Which member of a group is cached.
        response_limit: Limit of a whole response in tokens.
        on_failure: The question's next visit after a group without a correct member: ``keep`` cuts the cached response
            again (paper), ``restart`` takes the full path.
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
        """Give a prompt a prefix and a suffix budget.

        A question takes the full path if it has no cached response or is to restart.

        Raises:
            ConfigurationError: The suffix budget is below 1 token.
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
                f"cache.budget: {type(self.budget).__name__} gives question {prompt.uid} a suffix budget of {tokens} "
                f"tokens (prefix {prefix_length}, cut {cut}): return at least 1"
            )
        return RolloutRequest(
            prompt=prompt,
            prefix_ids=tuple(response.token_ids[:prefix_length].tolist()),
            max_new_tokens=tokens,
            cached_length=len(response),
            prefix_spans=cut_spans(response.spans, prefix_length),
        )

    def record(self, group: Group) -> None:
        """Refresh the cache from a scored group."""
        self.apply(self.update_from(group))

    def update_from(self, group: Group) -> CacheUpdate:
        """The change that a scored group makes to its question's entry. Does not make it; see :meth:`apply`."""
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
        """Change an entry and tell the cut strategy the outcome.

        Ranks that apply the same updates in the same order have the same cache. If a question has several updates, the
        last one's response stays.
        """
        entry = self.cache.entry(update.uid)
        if update.response is not None:
            self.cache.remember(update.uid, update.response)
        entry.visits += 1
        entry.restart = self.on_failure == "restart" and not any(update.outcome.correct)
        self.cut.observe(entry, update.outcome)

    def initial_update(self, group: Group) -> tuple[str, CachedResponse | None]:
        """The question and the best candidate of a group that the starting policy sampled (eq. 1)."""
        return group.request.prompt.uid, initial_response(group, self.keep_unfinished)

    def initialise(self, uid: str, response: CachedResponse | None) -> None:
        """Fill an entry before training; without a response, make an empty one."""
        if response is None:
            self.cache.entry(uid)
        else:
            self.cache.remember(uid, response)

    def _candidates(self, group: Group) -> list[int]:
        return _candidates(group, self.keep_unfinished)


def drawn_prefix(cut: CutStrategy, entry: CacheEntry, response: CachedResponse) -> int:
    """Length of the prefix at an entry's next visit. At least one token of the response is always sampled again."""
    prefix_length = cut.prefix_length(entry, response, question_generator(SeedPurpose.CUT, entry.uid, entry.visits))
    return max(min(prefix_length, len(response) - 1), 0)


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


def initial_response(group: Group, keep_unfinished: bool) -> CachedResponse | None:
    """The best candidate of a group, with ties broken at random; ``None`` if there is no candidate."""
    candidates = _candidates(group, keep_unfinished)
    if not candidates:
        return None
    top = max(group.rewards[i] for i in candidates)
    rng = question_generator(SeedPurpose.INITIAL_CHOICE, group.request.prompt.uid, 0)
    return cached_response(group, int(rng.choice([i for i in candidates if group.rewards[i] == top])))


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


def question_generator(purpose: SeedPurpose, uid: str, visit: int) -> np.random.Generator:
    """The run's generator for a purpose at a visit of a question."""
    return derive_generator(purpose, stable_hash(uid), visit)


def _candidates(group: Group, keep_unfinished: bool) -> list[int]:
    return [i for i, c in enumerate(group.completions) if c.finished or keep_unfinished]
