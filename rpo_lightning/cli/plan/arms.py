"""The caches from which the arms of a plan take their prefixes, filled from answers without a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rpo_lightning.cache.budgets import FullBudget
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.refresh import CorrectMemberRefresh
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group


class KeptShares:
    """Prefixes that keep fixed shares of a correct response of each question: the policy's own, or else a trace.

    Args:
        traces: Responses from elsewhere (``cache.path``); may be empty.
        groups: Answers without a prefix.
        response_limit: Limit of a whole response in tokens.
        steps: Where cuts may lie; anywhere if not given.

    Attributes:
        own: Questions to which one of the answers is correct.
        traced: Questions with a correct response from elsewhere.
    """

    def __init__(
        self, traces: ExperienceCache, groups: Sequence[Group], response_limit: int, steps: StepEnds | None = None
    ) -> None:
        self._limit = response_limit
        self._steps = steps
        self._cache = ExperienceCache(traces.tokenizer_fingerprint)
        recorder = self.cut_at(0.5)
        for group in groups:
            recorder.record(group)
        questions = {group.request.prompt.uid for group in groups}
        known = [entry for uid in questions if (entry := traces.get(uid)) is not None]
        found = {entry.uid: trace for entry in known if (trace := entry.first_correct) is not None}
        self.own = {uid for uid in questions if self._cache.has_anchor(uid)}
        self.traced = set(found)
        for uid in self.traced - self.own:
            self._cache.remember(uid, found[uid])

    def cut_at(self, share: float) -> CachedPrefixes:
        """Prefixes that keep this share."""
        return CachedPrefixes(
            cache=self._cache,
            cut=AnchoredCut(share, share),
            budget=FullBudget(),
            refresh=CorrectMemberRefresh(),
            response_limit=self._limit,
            steps=self._steps,
        )


def initialise(
    prefixes: CachedPrefixes, settings: ExperienceCacheCallback, batches: Iterable[Sequence[Group]], size: int,
    ranks: Ranks,
) -> None:  # fmt: skip
    """Fill a cache as a run with these settings would before it cuts for the first time; a collective.

    With eager initialisation the first ``initial_samples`` answers are the candidates. With lazy initialisation the
    first visit of a question is a group without a prefix. Questions that have a response already are left alone.

    Args:
        prefixes: They hold the cache.
        settings: The config's.
        batches: Answers without a prefix, an iteration's at a time.
        size: Members of a group.
        ranks: The ranks that share the questions.
    """
    for groups in batches:
        missing = [group for group in groups if not prefixes.cache.has_anchor(group.request.prompt.uid)]
        if settings.initialisation == "eager":
            found = [prefixes.initial_update(first_members(g, settings.initial_samples)) for g in missing]
            for uid, responses in (pair for of_rank in ranks.gather(found) for pair in of_rank):
                prefixes.initialise(uid, responses)
        else:
            prefixes.learn([first_members(group, size) for group in missing], ranks)


def first_members(group: Group, count: int) -> Group:
    """A group of the first members of another, or all of them if there are fewer."""
    return replace(
        group,
        completions=group.completions[:count],
        samples=group.samples[:count],
        rewards=group.rewards[:count],
        reward_terms={name: values[:count] for name, values in group.reward_terms.items()},
    )
