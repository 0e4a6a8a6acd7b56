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

from rpo_lightning.cache.parquet import filling_of, read_cache
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.callbacks.answer_progress import AnswerBar
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.hashing import short_name
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
        origin: Identifies what the answers depend on: policy, seed, sampling and limits.
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
    def from_dict(cls, saved: dict[str, Any]) -> FillingProgress:
        """The inverse of ``as_dict``."""
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

    def saved_in(self, path: Path, new: FillingProgress) -> FillingProgress:
        """Take up the filling that a cache file holds, if its answers are those that a new one would give.

        Args:
            path: The file of a run that was stopped.
            new: What is to be done otherwise.

        Returns:
            The progress to go on from: that of the file, whose cache is taken, or ``new``.
        """
        saved = filling_of(path)
        if saved is None:
            return new
        progress = FillingProgress.from_dict(saved)
        if progress.origin != new.origin or not {*new.uids} <= {*progress.uids}:
            log.warning(
                f"{path}: was filled with another policy, seed, sampling, limit or set of questions, so this run fills "
                "its cache anew"
            )
            return new
        cache = read_cache(path, self._served.cache.tokenizer_fingerprint, self._module.vocabulary_size)
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
            type(served.refresh).__name__,
            type(module.engine).__name__,
            type(module.grader.verifier).__name__,
            [(reward.name, reward.weight) for reward in module.grader.rewards],
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


def newest_filling(folders: Sequence[Path], name: str) -> Path | None:
    """The newest cache file of a run that filled it and wrote no later one, in any of the folders."""
    paths = [folder / name for folder in folders if (folder / name).is_file()]
    unfinished = [path for path in paths if filling_of(path) is not None]
    return max(unfinished, key=lambda path: path.stat().st_mtime_ns, default=None)
