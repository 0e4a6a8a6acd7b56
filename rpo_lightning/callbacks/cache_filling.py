"""Eager initialisation of the experience cache: samples answers to all questions before training (eq. 1).

With a large policy it takes hours. Therefore what is filled is saved as it goes, and a run that was stopped continues
where it stopped. Each batch of questions has a seed of its own, so the filled cache is the same, stopped or not, on any
number of ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_lightning.cache.parquet import filling_of, read_cache, whole_filling_of
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.callbacks.answer_progress import AnswerBar
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.hashing import short_name
from rpo_lightning.core.identity import description
from rpo_lightning.core.seeds import SeedPurpose, derive_seed, run_seed
from rpo_lightning.core.types import Group, Prompt, full_path_request
from rpo_lightning.policy.weights import policy_fingerprint
from rpo_lightning.rollout.engine import Sampling

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)

# Saving a large cache takes a while: it is saved once a minute, and takes at most a 20th of the time.
SECONDS_BETWEEN_SAVES, SHARE_OF_SAVING = 60.0, 0.05


@dataclass(frozen=True)
class FillingProgress:
    """How far a filling is; saved with the cache.

    Attributes:
        origin: Identifies what the answers depend on: policy, seed, sampling, limits, and what grades them.
        uids: The questions to fill, in order.
        done: How many of them are filled.
        tokens: Tokens decoded for them.
        seconds: Seconds that it took.
    """

    origin: str
    uids: tuple[str, ...]
    done: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to fill."""
        return self.done >= len(self.uids)

    def as_dict(self) -> dict[str, Any]:
        """Primitives for files and checkpoints."""
        return {**asdict(self), "uids": list(self.uids)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], where: str) -> FillingProgress:
        """The inverse of ``as_dict``.

        Raises:
            CacheError: It is none that ``as_dict`` has made.
        """
        kinds: dict[str, Any] = {"origin": str, "uids": list, "done": int, "tokens": int, "seconds": int | float}
        if saved.keys() != kinds.keys() or not all(isinstance(saved[name], kinds[name]) for name in kinds):
            raise CacheError(f"{where}: does not tell how far its filling is: name another one")
        return cls(**{**saved, "uids": tuple(saved["uids"])})


class CacheFilling:
    """Fills a cache.

    Args:
        module: The module whose policy answers.
        served: The cache and what may be cached.
        samples: Answers to each question.
        sampling: How they are drawn.
        batch_size: Questions of one batch.
    """

    def __init__(
        self, module: RPOModule, served: CachedPrefixes, samples: int, sampling: Sampling, batch_size: int
    ) -> None:
        self._module = module
        self._served = served
        self._samples = samples
        self._sampling = sampling
        self._batch_size = batch_size

    def new(self, prompts: Sequence[Prompt]) -> FillingProgress:
        """A filling of the questions that have no response yet; a collective."""
        known = {entry.uid for entry in self._served.cache if entry.has_anchor}
        uids = tuple(p.uid for p in prompts if p.uid not in known)
        return FillingProgress(self._origin(prompts) if uids else "", uids)  # it reads all weights

    def saved_in(self, path: Path, new: FillingProgress, must_be_sound: bool) -> FillingProgress:
        """Take up the filling that a cache file holds, if its answers are those that a new one would give.

        Args:
            path: The file of a run that was stopped.
            new: What is to be done otherwise.
            must_be_sound: Whether the user has named the file, and it must hold what it should.

        Returns:
            The progress to go on from: that of the file, whose cache is taken, or ``new``.

        Raises:
            CacheError: The file must be sound and is not.
        """
        saved = filling_of(path)
        if saved is None:
            return new
        try:
            progress = FillingProgress.from_dict(saved, str(path))
            if progress.origin != new.origin or not {*new.uids} <= {*progress.uids}:
                log.warning(
                    f"{path}: was filled with another policy, seed, sampling, limit, reward, verifier or set of "
                    "questions, so this run fills its cache anew"
                )
                return new
            cache = read_cache(path, self._served.cache.tokenizer_fingerprint, self._module.vocabulary_size)
        except CacheError as error:
            if must_be_sound:
                raise
            log.warning(f"{error}. This run fills its cache anew")
            return new
        self._served.cache.load_state_dict(cache.state_dict())
        log.info(f"{path}: the cache is filled on from question {progress.done} of {len(progress.uids)}")
        return progress

    def run(
        self, prompts: Sequence[Prompt], progress: FillingProgress, keep: Callable[[FillingProgress], None]
    ) -> FillingProgress:
        """Fill what is left; a collective.

        Args:
            prompts: The training questions.
            progress: Where to begin.
            keep: Takes the progress after every round of batches.

        Raises:
            CacheError: A question of the filling is not among the training questions.
        """
        module, by_uid = self._module, {p.uid: p for p in prompts}
        unknown = next((uid for uid in progress.uids if uid not in by_uid), None)
        if unknown is not None:
            raise CacheError(
                f"the cache was being filled for question {unknown}, which is no training question now: start without "
                "--ckpt_path"
            )
        questions = [by_uid[uid] for uid in progress.uids]
        module.timer.take()  # earlier seconds are not part of it
        bar = AnswerBar("filling the cache", len(questions), module.trainer.is_global_zero)
        bar.update(progress.done, 0)
        begun = progress.tokens
        while not progress.is_complete:
            found, tokens = self._round(questions, progress.done)
            progress = replace(
                progress,
                done=progress.done + found,
                tokens=progress.tokens + tokens,
                seconds=progress.seconds + sum(module.timer.take().values()),
            )
            bar.update(found, progress.tokens - begun)
            keep(progress)
        bar.close()
        return progress

    def _round(self, questions: Sequence[Prompt], done: int) -> tuple[int, int]:
        """Fill a batch on every rank; returns how many questions were filled and how many tokens they took."""
        ranks = self._module.ranks
        # Each batch goes to one rank, and its start is its seed: the cache is the same on any number of ranks.
        start = done + ranks.rank * self._batch_size
        groups = self._sample(questions, start) if start < len(questions) else self._sample([], 0)
        of_rank = [self._served.initial_update(g) for g in groups]
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        everyone = ranks.gather((of_rank, tokens))
        for found, _ in everyone:
            for uid, responses in found:
                self._served.initialise(uid, responses)
        return sum(len(found) for found, _ in everyone), sum(tokens for _, tokens in everyone)

    def _sample(self, questions: Sequence[Prompt], start: int) -> list[Group]:
        """Answer a batch. An engine of several ranks needs all of them, also those without questions."""
        batch = questions[start : start + self._batch_size]
        requests = [full_path_request(p, self._module.max_response_tokens) for p in batch]
        seed = derive_seed(SeedPurpose.INITIALISATION, start)
        groups: list[Group] = self._module.roll_out(requests, self._samples, self._sampling, seed)
        return groups

    def _origin(self, prompts: Sequence[Prompt]) -> str:
        module, served = self._module, self._served
        parts = (
            policy_fingerprint(module.loaded_policy),
            served.cache.tokenizer_fingerprint,
            run_seed(),
            self._samples,
            self._sampling,
            self._batch_size,
            module.max_response_tokens,
            module.stop,
            # What template, system prompt and examples make of the questions, which their identifiers do not tell.
            short_name("".join(short_name(f"{p.uid} {p.token_ids}") for p in prompts)),
            served.keep_unfinished,
            description(type(served.refresh)),
            description(type(module.engine)),
            description(module.grader.verifier),
            [(reward.name, reward.weight, description(reward)) for reward in module.grader.rewards],
        )
        return short_name(repr(parts))


class SavingClock:
    """Says when a filling is due to be saved."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SECONDS_BETWEEN_SAVES

    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    def saved(self, seconds: float) -> None:
        """Note that saving took so many seconds."""
        self._next = time.monotonic() + max(SECONDS_BETWEEN_SAVES, seconds / SHARE_OF_SAVING)


def newest_filling(
    folders: Sequence[Path], name: str, than: Path | None = None, tell: Callable[[str], None] = lambda _: None
) -> Path | None:
    """The newest whole cache file of a run that filled it and wrote no later one, in any of the folders.

    Args:
        folders: The folders.
        name: The name of cache files.
        than: A file that it must not be older than.
        tell: Takes a line for each damaged one that is newer and passed over.
    """
    paths = [folder / name for folder in folders if (folder / name).is_file()]
    oldest = 0 if than is None else than.stat().st_mtime_ns
    for path in sorted({*paths}, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if path.stat().st_mtime_ns < oldest:
            return None
        try:
            if whole_filling_of(path) is not None:
                return path
        except CacheError as error:
            tell(f"{error}: it is passed over")
    return None
