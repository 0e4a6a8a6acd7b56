"""Exceptions that one rank has alone.

A checkpoint is written by all ranks together. With ``save_on_exception`` a rank that fails alone (a reward that
raises, memory that runs out) would begin one and wait for ranks that wait for it elsewhere: nobody would exit, and
nobody would read why. Ranks that fail together can save.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import distributed

from rpo_lightning.core.errors import ConfigurationError

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


class LoneExceptionCallback(Callback):
    """Lets checkpoints be saved on an exception only if all ranks have one. ``RPOModule`` brings one itself.

    Lightning calls checkpoint callbacks last, so that this one decides before them.

    Args:
        patience: Seconds that ranks wait for each other.
    """

    def __init__(self, patience: float = 30.0) -> None:
        self.patience = timedelta(seconds=patience)
        self._group: Any = None
        self._silenced: list[ModelCheckpoint] = []

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Make a group of ranks that nothing else waits in, and that does not wait for long.

        Raises:
            ConfigurationError: A callback would save on exceptions whatever this one finds.
        """
        for callback in self._silenced:  # in an earlier fit
            callback.save_on_exception = True
        self._silenced = []
        if trainer.world_size == 1:
            return
        if any(isinstance(callback, OnExceptionCheckpoint) for callback in _callbacks(trainer)):
            raise ConfigurationError(
                "OnExceptionCheckpoint would wait for ever where one rank fails alone: use ModelCheckpoint with "
                "save_on_exception"
            )
        trainer.strategy.barrier()  # what is not long either is the time in which a group may be made
        self._group = distributed.new_group(backend="gloo", timeout=self.patience)

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """See who else has one."""
        saving = [c for c in _callbacks(trainer) if isinstance(c, ModelCheckpoint) and c.save_on_exception]
        if trainer.world_size == 1 or not saving or self._all_fail():
            return
        for callback in saving:
            callback.save_on_exception = False
        self._silenced = saving
        if self._group is not None:
            log.warning(
                f"rank {trainer.global_rank} did not fail together with all others: no checkpoint is saved of this "
                "moment, earlier ones stay"
            )

    def _all_fail(self) -> bool:
        """Whether all ranks ask; before training begins there is nothing to save."""
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
