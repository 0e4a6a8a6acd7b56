"""Finds the folder of a run's files and the checkpoints of earlier runs; base classes of callbacks that write files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger's run, or ``default_root_dir`` without a logger; a collective.

    ``ModelCheckpoint`` puts its checkpoints there too.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = str(_experiment_folder(trainer, logger) / version)
    return Path(trainer.strategy.broadcast(folder))


def _experiment_folder(trainer: Trainer, logger: Logger) -> Path:
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name))


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest last checkpoint of this run or of the experiment's earlier runs.

    Lightning looks only into the folder of the new run. That folder is empty unless ``ModelCheckpoint.dirpath`` is set.
    """
    found: set[str | Path] = set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, OnExceptionCheckpoint):
            found.add(callback.ckpt_path)
        if isinstance(callback, ModelCheckpoint):
            found |= callback._find_last_checkpoints(trainer)
            if callback.dirpath is None and trainer.logger is not None:
                name = f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}"
                found |= set(_experiment_folder(trainer, trainer.logger).glob(f"*/checkpoints/{name}"))
    paths = [Path(path) for path in found if Path(path).exists()]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


class RunFolderCallback(Callback):
    """A callback that writes into the run's folder.

    Attributes:
        folder: The run's folder, from ``setup`` on.
    """

    folder: Path

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Look the run's folder up; a collective."""
        self.folder = run_folder(trainer)

    @staticmethod
    def leaves_files(trainer: Trainer) -> bool:
        """Whether the run writes files: a trial (``fast_dev_run``) writes none."""
        return not trainer.fast_dev_run  # type: ignore[attr-defined]

    @classmethod
    def writes(cls, trainer: Trainer) -> bool:
        """Whether this rank writes files: only rank 0 does."""
        return trainer.is_global_zero and cls.leaves_files(trainer)


class FinalFilesCallback(RunFolderCallback, ABC):
    """A callback that writes files when training ends.

    A run that crashed in its last validation has no steps left when resumed, so Lightning skips ``on_train_end``. The
    files are then written in ``on_fit_end``.
    """

    _has_written = False

    @abstractmethod
    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files; a collective."""

    def on_fit_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Note that the files are still to be written."""
        self._has_written = False

    def on_train_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files."""
        self.write_final_files(trainer, pl_module)
        self._has_written = True

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files if ``on_train_end`` was skipped."""
        if not self._has_written:
            pl_module.to(
                trainer.strategy.root_device
            )  # Lightning moved it to the CPU; gathering shards needs the device
            self.write_final_files(trainer, pl_module)
