"""Ends a run when one rank fails alone, or is killed.

All ranks write a checkpoint together. With ``save_on_exception``, a rank that fails alone (a reward raises, memory runs
out) would start a checkpoint and wait for the other ranks, which wait for it elsewhere. The run would hang without an
error message. Ranks that fail together can save a checkpoint. ``rpo_lightning.core.rank_watch`` ends ranks that
wait for one that has gone.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.rank_watch import RankWatch

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


class LoneExceptionCallback(Callback):
    """Saves checkpoints on an exception only if all ranks have one. ``RPOModule`` adds one itself.

    Lightning calls checkpoint callbacks last, therefore this callback decides before them.

    Args:
        patience: Seconds to wait for the other ranks.
    """

    def __init__(self, patience: float = 30.0) -> None:
        self.patience = timedelta(seconds=patience)
        self._group: Any = None
        self._watch: RankWatch | None = None
        self._silenced: list[ModelCheckpoint] = []

    def on_fit_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Begin to watch the other ranks, before the cache is filled; a collective."""
        if trainer.world_size > 1:
            self._watch = RankWatch(pl_module.ranks)

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Make a process group of its own, whose barrier gives up after ``patience`` seconds.

        Raises:
            ConfigurationError: ``OnExceptionCheckpoint`` is set, which saves even if one rank fails alone.
        """
        for callback in self._silenced:  # by an earlier fit
            callback.save_on_exception = True
        self._silenced = []
        if trainer.world_size == 1:
            return
        if any(isinstance(callback, OnExceptionCheckpoint) for callback in _callbacks(trainer)):
            raise ConfigurationError(
                "trainer.callbacks: OnExceptionCheckpoint waits for ever if one rank fails alone; use ModelCheckpoint "
                "with save_on_exception"
            )
        trainer.strategy.barrier()  # new_group waits for all ranks, and for no longer than the timeout
        self._group = distributed.new_group(backend="gloo", timeout=self.patience)

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """Stop checkpoints from being saved, unless all ranks have an exception. A signal's is saved already."""
        saving = [c for c in _callbacks(trainer) if isinstance(c, ModelCheckpoint) and c.save_on_exception]
        is_stopped = isinstance(exception, SIGTERMException)
        if self._watch is not None:
            if is_stopped:
                self._watch.is_over()
            else:
                self._watch.fails(exception)
        if not is_stopped and (trainer.world_size == 1 or not saving or self._all_fail()):
            return
        for callback in saving:
            callback.save_on_exception = False
        self._silenced = saving
        if self._group is not None and not is_stopped:
            log.warning(
                f"rank {trainer.global_rank} failed, and not all others did: no checkpoint of this moment is saved; "
                "resume from an earlier one"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Let the other ranks know that this one is done."""
        if self._watch is not None:
            self._watch.is_over()
            self._watch = None

    def _all_fail(self) -> bool:
        """Whether all ranks call this; false before training, when there is nothing to save."""
        if self._group is None:
            return False
        try:
            distributed.barrier(self._group)
        except RuntimeError as error:
            log.debug("not all ranks have an exception", exc_info=error)
            return False
        return True


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]
