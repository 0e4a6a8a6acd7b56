"""The experience cache as a callback, which turns a GRPO or DAPO run into an RPO run.

Before training it fills the cache with answers of the starting policy (``rpo_lightning.callbacks.cache_filling``,
paper), or leaves that to the first visits. The
data module asks it for the prefix of each prompt. After each iteration the ranks exchange their cache updates in one
collective and apply them in rank order, so all caches stay equal. Every checkpoint holds the whole cache.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rpo_lightning.cache.budgets import FullBudget, SuffixBudget
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, FractionOfShortestCut, require_usable_notes
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.questions import require_same_questions, tell_of_second_answers
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh, RefreshRule
from rpo_lightning.cache.soundness import FORMAT_VERSION, require_same_origin
from rpo_lightning.cache.steps import StepEnds
from rpo_lightning.callbacks.cache_filling import CacheFilling, FillingProgress, SavingClock
from rpo_lightning.callbacks.run_folder import FinalFilesCallback
from rpo_lightning.callbacks.stop_signals import stop_between_batches
from rpo_lightning.callbacks.weight_sync import sync_engine
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.run_files import CACHE_FILE
from rpo_lightning.core.types import Prompt
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint, tokens_that_match
from rpo_lightning.rollout.engine import Sampling

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


class ExperienceCacheCallback(FinalFilesCallback):
    """Maintains the experience cache and serves prefixes from it.

    Args:
        cut: How much of a cached response becomes the prefix; ``FractionOfShortestCut(0.5)`` (the paper's ℓ/2) if not
            given. Of several responses to a question, this and ``UniformCut`` cut the one in slot 0 only.
        refresh: Which member of a group is cached; ``EpsilonGreedyRefresh(0.5)`` if not given.
        budget: How long a suffix may get; ``FullBudget()`` (up to the response limit) if not given.
        initialisation: ``eager`` samples responses to all questions before training (paper). With ``lazy``, the first
            visit of a question takes the full path, trains, and fills its entry.
        initial_samples: Responses to each question (n) that eager initialisation samples; the best is cached.
        initial_sampling: How they are drawn; as in training if not given.
        initial_batch_size: Questions of one batch of eager initialisation.
        on_failure: What to do after a group without a correct member: ``keep`` cutting the cached response (paper), or
            ``restart`` the question without a prefix.
        keep_unfinished: Whether responses that ran out of budget may be cached.
        path: A cache file to start from, made by any model with this tokenizer. Eager initialisation samples only the
            questions that it lacks.
        prefer_own: Whether a response of this run may replace a correct one from elsewhere, which ``path`` brought.
        step_end: A regular expression for tokens that end a reasoning step; a newline for chat models. Cuts are moved
            to the nearest end of a step. Anywhere in a response if not given.

    Attributes:
        initialisation_tokens: Tokens that eager initialisation decoded.
        initialisation_seconds: Seconds that it took.
        filled_by: A cache file of a run that was stopped while it filled its cache, to go on from; set before training.

    Raises:
        ConfigurationError: A number is below 1.
    """

    def __init__(
        self,
        cut: CutStrategy | None = None,
        refresh: RefreshRule | None = None,
        budget: SuffixBudget | None = None,
        initialisation: Literal["eager", "lazy"] = "eager",
        initial_samples: int = 1,
        initial_sampling: Sampling | None = None,
        initial_batch_size: int = 64,
        on_failure: Literal["keep", "restart"] = "keep",
        keep_unfinished: bool = False,
        path: str | None = None,
        prefer_own: bool = True,
        step_end: str | None = None,
    ) -> None:
        if initial_samples < 1 or initial_batch_size < 1:
            raise ConfigurationError(
                f"cache.initial_samples and cache.initial_batch_size must be at least 1, got {initial_samples} "
                f"and {initial_batch_size}"
            )
        self.cut = cut or FractionOfShortestCut()
        self.refresh = refresh or EpsilonGreedyRefresh()
        self.budget = budget or FullBudget()
        self.initialisation = initialisation
        self.initial_samples = initial_samples
        self.initial_sampling = initial_sampling
        self.initial_batch_size = initial_batch_size
        self.on_failure = on_failure
        self.keep_unfinished = keep_unfinished
        self.path = path
        self.prefer_own = prefer_own
        self.step_end = step_end
        self.initialisation_tokens = 0
        self.initialisation_seconds = 0.0
        self.filled_by: Path | None = None
        self._prefixes: CachedPrefixes | None = None
        self._filling: FillingProgress | None = None
        self._is_restored = False

    @property
    def cache(self) -> ExperienceCache:
        """The cache, from ``setup`` on.

        Raises:
            ConfigurationError: No trainer has set the callback up.
        """
        return self._served.cache

    @property
    def _served(self) -> CachedPrefixes:
        if self._prefixes is None:
            raise ConfigurationError(
                "the experience cache is made when a trainer sets the callback up: call trainer.fit first"
            )
        return self._prefixes

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Make the cache and hand its prefixes to the data module.

        Raises:
            ConfigurationError: The data module serves no prefixes, or the run would overwrite ``path``.
            CacheError: The cache was made with another tokenizer, or for other questions.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "make_request"):
            raise ConfigurationError(
                "ExperienceCacheCallback serves its prefixes through an RPODataModule: pass one to trainer.fit"
            )
        if self._saves_over_its_source and self.leaves_files(trainer):
            raise ConfigurationError(
                f"cache.path={self.path} is where this run would save its own cache: move the file, or give the run "
                "another folder (trainer.logger, trainer.default_root_dir)"
            )
        self._prefixes = self.prefixes_of(self.starting_cache(trainer, pl_module, data), pl_module)
        for caveat in self._prefixes.caveats(has_traces=self.path is not None) if trainer.is_global_zero else ():
            log.warning(caveat)
        self._is_restored, self._filling = False, None
        data.make_request = self._prefixes.request

    def prefixes_of(self, cache: ExperienceCache, module: RPOModule) -> CachedPrefixes:
        """What serves prefixes from a cache and refreshes it, as these settings say."""
        return CachedPrefixes(
            cache=cache,
            cut=self.cut,
            budget=self.budget,
            refresh=self.refresh,
            response_limit=module.max_response_tokens,
            on_failure=self.on_failure,
            keep_unfinished=self.keep_unfinished,
            prefer_own=self.prefer_own,
            steps=self.step_ends(module),
        )

    def step_ends(self, module: RPOModule) -> StepEnds | None:
        """Where cuts may lie; ``None`` for anywhere."""
        if self.step_end is None:
            return None
        return StepEnds(np.asarray(tokens_that_match(module.tokenizer, self.step_end, "cache.step_end")))

    @property
    def _saves_over_its_source(self) -> bool:
        return self.path is not None and Path(self.path).resolve() == (self.folder / CACHE_FILE).resolve()

    def starting_cache(self, trainer: Trainer, module: RPOModule, data: Any) -> ExperienceCache:
        """The cache of this callback's earlier run, or that of ``path``, or an empty one.

        Raises:
            CacheError: The cache was made with another tokenizer, or for other questions, or is damaged.
        """
        fingerprint, vocabulary_size = tokenizer_fingerprint(module.tokenizer), module.vocabulary_size
        if self._prefixes is not None:
            where, cache = "the cache of an earlier run", self.cache
            require_same_origin(FORMAT_VERSION, cache.tokenizer_fingerprint, fingerprint, where)
        elif self.path is not None:
            where, cache = self.path, read_cache(self.path, fingerprint, vocabulary_size)
        else:
            return ExperienceCache(fingerprint, vocabulary_size)
        require_usable_notes(self.cut, cache, where)
        if trainer.global_step == 0:  # otherwise the same trainer continues to count its updates
            cache.forget_updates()
        prompts = data.read("train", "", module.tokenizer, module.grader.verifier, module.grader.rewards)
        require_same_questions(cache, prompts, where)
        if trainer.is_global_zero:
            tell_of_second_answers(cache, prompts, where)
        return cache

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Fill the cache with answers of the starting policy, unless a checkpoint has restored a filled one."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts: list[Prompt] = data.prompts["train"]
        if self._is_restored:
            require_same_questions(self.cache, prompts, "the checkpoint's cache")
        if self.initialisation == "eager" and not (self._is_restored and self._filling is None):
            with trainer.precision_plugin.train_step_context():  # the precision of later rollouts
                self._fill(trainer, pl_module, prompts)

    def _fill(self, trainer: Trainer, module: RPOModule, prompts: list[Prompt]) -> None:
        """Fill the cache, going on from a restored filling or from a file; a collective."""
        sampling = self.initial_sampling or module.sampling
        filling = CacheFilling(module, self._served, self.initial_samples, sampling, self.initial_batch_size)
        if self._filling is None:
            self._filling = filling.new(prompts)
            begun = self.filled_by or (None if self.path is None else Path(self.path))
            if begun is not None and self._filling.uids:
                self._filling = filling.saved_in(begun, self._filling, must_be_sound=self.filled_by is None)
            self.filled_by = None  # a later fit has a cache
        if not self._filling.is_complete:
            sync_engine(trainer)
            clock = SavingClock()

            def keep(progress: FillingProgress) -> None:
                self._filling = progress
                if clock.is_due():
                    clock.saved(self._save(trainer))
                stop_between_batches(trainer)

            self._filling = filling.run(prompts, self._filling, keep)
        if self._filling.uids:
            self.initialisation_tokens, self.initialisation_seconds = self._filling.tokens, self._filling.seconds
            if trainer.is_global_zero:
                log.info(f"cache initialised with {self.initialisation_tokens} decoded tokens")
            self._save(trainer)  # as a filling, though a complete one: a run killed before its first checkpoint has it
        self._filling = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the cache with all groups of this iteration, trained on or not; a collective."""
        with pl_module.timer("cache"):
            visits = self._served.learn(pl_module.groups, pl_module.ranks)
        statistics = self.cache.statistics(trainer.global_step) | visits
        pl_module.log_dict({f"cache/{k}": v for k, v in statistics.items()}, batch_size=len(batch))

    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Save the cache into the run's folder."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """Save the cache so far."""
        if self._prefixes is not None and len(self.cache):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> float:
        """Save the cache, with the progress of its filling; returns the seconds that it took."""
        start = time.monotonic()
        if self.writes(trainer) and not self._saves_over_its_source:
            filling = None if self._filling is None else self._filling.as_dict()
            path = self.folder / CACHE_FILE
            with self.unwritten.goes_on(path, "every checkpoint holds the cache too"):
                write_cache(self.cache, path, filling)
        return time.monotonic() - start

    def state_dict(self) -> dict[str, Any]:
        """The cache for the checkpoint; empty before there is one."""
        if self._prefixes is None:
            return {}
        return {
            "cache": self.cache.state_dict(),
            "initialisation_tokens": self.initialisation_tokens,
            "initialisation_seconds": self.initialisation_seconds,
            "filling": None if self._filling is None else self._filling.as_dict(),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: RPOModule, checkpoint: dict[str, Any]) -> None:
        """Restore the cache in ``fit``; evaluation uses none.

        It is taken out of the checkpoint here, because Lightning copies a state before it calls ``load_state_dict``.
        """
        state = checkpoint["callbacks"].pop(self.state_key, None)
        if state is not None and trainer.state.fn == TrainerFn.FITTING:
            self.load_state_dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the cache. Lightning calls ``setup`` first."""
        self._restore(self.cache, state_dict)
        self.initialisation_tokens = state_dict["initialisation_tokens"]
        self.initialisation_seconds = state_dict["initialisation_seconds"]
        filling = state_dict.get("filling")  # not in checkpoints of earlier releases
        self._filling = None if filling is None else FillingProgress.from_dict(filling, "the checkpoint's cache")
        self._is_restored = True

    def require_state(self, state_dict: dict[str, Any], module: RPOModule) -> None:
        """Check the state of a checkpoint, before the policy is loaded.

        Raises:
            CacheError: It is damaged, or of another tokenizer.
        """
        self._restore(ExperienceCache(tokenizer_fingerprint(module.tokenizer), module.vocabulary_size), state_dict)

    def _restore(self, cache: ExperienceCache, state_dict: dict[str, Any]) -> None:
        cache.load_state_dict(state_dict["cache"])
        require_usable_notes(self.cut, cache, "the checkpoint's cache")
