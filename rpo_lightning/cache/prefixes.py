"""RPO's use of the experience cache: prefixes from cached responses, cached responses from scored groups.

``CachedPrefixes`` is all that RPO adds to GRPO or DAPO. ``request`` turns a prompt into a rollout request with a
prefix. ``record`` refreshes the cache from a scored group. Draws are seeded by run, question and visit. They depend
neither on the order of the questions nor on the rank, and a resumed run draws what the uninterrupted run would have
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rpo_lightning.cache.budgets import SuffixBudget
from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.candidates import best_responses, cached_response, candidates, fill
from rpo_lightning.cache.cuts import CutStrategy, GroupOutcome
from rpo_lightning.cache.draws import drawn_prefix, question_generator
from rpo_lightning.cache.refresh import RefreshRule
from rpo_lightning.cache.spans import cut_spans
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import SeedPurpose
from rpo_lightning.core.types import Group, Prompt, RolloutRequest, full_path_request


@dataclass(frozen=True)
class CacheUpdate:
    """A change to one entry after a scored group, in the form that ranks exchange.

    Attributes:
        uid: The question.
        responses: The responses to cache; without any, the entry keeps what it has.
        outcome: The outcome for the cut strategy.
    """

    uid: str
    responses: tuple[CachedResponse, ...]
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
        prefer_own: Whether a response of this run may replace a correct one from elsewhere.
        steps: Where cuts may lie; anywhere if not given.
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
        prefer_own: bool = True,
        steps: StepEnds | None = None,
    ) -> None:
        self.cache = cache
        self.cut = cut
        self.budget = budget
        self.refresh = refresh
        self.response_limit = response_limit
        self.on_failure = on_failure
        self.keep_unfinished = keep_unfinished
        self.prefer_own = prefer_own
        self.steps = steps

    def request(self, prompt: Prompt) -> RolloutRequest:
        """Give a prompt a prefix and a suffix budget.

        A question takes the full path if nothing is cached for it, if it is to restart, or if the cut strategy says so.

        Raises:
            ConfigurationError: The suffix budget is below 1 token.
        """
        entry = self.cache.get(prompt.uid)
        if entry is None or entry.restart or not entry.has_anchor:
            return full_path_request(prompt, self.response_limit)
        response, prefix_length = drawn_prefix(self.cut, entry, self.steps, self.response_limit)
        if response is None or prefix_length == 0:
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
            cached_correct=response.correct,
        )

    def record(self, group: Group) -> None:
        """Refresh the cache from a scored group."""
        self.apply(self.update_from(group))

    def update_from(self, group: Group) -> CacheUpdate:
        """The change that a scored group makes to its question's entry. Does not make it; see ``apply``."""
        request, uid = group.request, group.request.prompt.uid
        entry = self.cache.get(uid)
        visits = 0 if entry is None else entry.visits
        chosen = self.refresh.choose(
            group, candidates(group, self.keep_unfinished), question_generator(SeedPurpose.REFRESH, uid, visits)
        )
        return CacheUpdate(
            uid=uid,
            responses=tuple([cached_response(group, member) for member in chosen]),
            outcome=GroupOutcome(
                prefix_length=len(request.prefix_ids),
                cut=request.cut,
                rewards=group.rewards,
                correct=[sample.is_correct for sample in group.samples],
                lengths=group.lengths,
                cached_correct=request.cached_correct,
            ),
        )

    def apply(self, update: CacheUpdate) -> None:
        """Change an entry and tell the cut strategy the outcome.

        Ranks that apply the same updates in the same order have the same cache. If a question has several updates, the
        last one's response stays.
        """
        entry = self.cache.entry(update.uid)
        for response in update.responses:
            slot = self.refresh.slot(entry.slots, response, self.prefer_own)
            if slot is not None:
                self.cache.remember(update.uid, response, slot)
        entry.visits += 1
        entry.restart = self.on_failure == "restart" and not any(update.outcome.correct)
        self.cut.observe(entry, update.outcome)

    def apply_iteration(self, updates: Iterable[CacheUpdate]) -> dict[str, float]:
        """Apply the updates of an iteration, those of all ranks in rank order.

        Returns:
            What the visits were like; see ``visit_statistics``.
        """
        outcomes = []
        for update in updates:
            self.apply(update)
            outcomes.append(update.outcome)
        self.cut.end_iteration(self.cache)
        return visit_statistics(outcomes)

    def learn(self, groups: Sequence[Group], ranks: Ranks) -> dict[str, float]:
        """Refresh the cache from an iteration's groups, those of all ranks in rank order; a collective.

        Returns:
            What the visits were like; see ``visit_statistics``.
        """
        updates = ranks.gather([self.update_from(group) for group in groups])
        return self.apply_iteration(update for of_rank in updates for update in of_rank)

    def caveats(self, has_traces: bool) -> Iterator[str]:
        """Settings that have no effect on each other, a line for each.

        Args:
            has_traces: Whether the run starts from a cache file.
        """
        cut, refresh = type(self.cut).__name__, type(self.refresh).__name__
        if self.cut.cuts_wrong and not self.refresh.keeps_wrong:
            yield (
                f"cache.refresh={refresh} keeps no wrong response beside a correct one, so cache.cut={cut} has hardly "
                "any failing prefixes: use AnchorsRefresh with wrong=1"
            )
        if self.refresh.slots > 1 and type(self.cut).anchor is CutStrategy.anchor:
            yield (
                f"cache.refresh={refresh} keeps up to {self.refresh.slots} responses of a question, of which "
                f"cache.cut={cut} cuts the one in slot 0 only: use AnchoredCut or a success-led cut, or keep one"
            )
        elif self.refresh.keeps_wrong and not self.cut.cuts_wrong:
            yield (
                f"cache.refresh={refresh} keeps wrong responses that cache.cut={cut} never cuts: use wrong=0, or "
                "TargetSuccessCut with failing_prefixes=true"
            )
        if self.cut.follows_success and self.on_failure == "restart":
            yield (
                f"cache.on_failure=restart takes the full path after a failed group, where cache.cut={cut} would keep "
                "more of the response: use keep"
            )
        if not self.prefer_own and not has_traces:
            yield "cache.prefer_own=false has no effect without cache.path: nothing comes from elsewhere"

    def initial_update(self, group: Group) -> tuple[str, list[CachedResponse]]:
        """The question and the candidates of a group that the starting policy sampled (eq. 1), the best first."""
        return group.request.prompt.uid, best_responses(group, self.refresh, self.keep_unfinished)

    def initialise(self, uid: str, responses: Iterable[CachedResponse]) -> None:
        """Fill an entry before training; without responses, make an empty one."""
        fill(self.cache.entry(uid), self.refresh, responses)


def visit_statistics(outcomes: Sequence[GroupOutcome]) -> dict[str, float]:
    """What the visits of an iteration were like.

    Returns:
        ``kept_share``, the mean share of the cached response that prefixes kept, over the groups with a prefix, and
        ``unprefixed_success``, the share of correct members of the groups without one. Each is NaN if there was no such
        group: a logger would repeat the value of an earlier iteration if it got none.
    """
    kept = [outcome.kept_share for outcome in outcomes if outcome.prefix_length]
    plain = [outcome.success for outcome in outcomes if not outcome.prefix_length]
    means = {"kept_share": kept, "unprefixed_success": plain}
    return {name: sum(values) / len(values) if values else math.nan for name, values in means.items()}
