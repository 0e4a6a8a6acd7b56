"""Where a run's files go, and where those of earlier runs are."""

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
    """The folder of the first logger's run, in which ``ModelCheckpoint`` has its own too.

    ``default_root_dir`` where there is no logger. All ranks must ask for it together.
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
    """The newest of the last checkpoints that Lightning would find, and of those of the experiment's earlier runs.

    Lightning looks into the folder of the new run, which is empty unless checkpoints have a folder that is given.
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
    """A callback that writes into the run's folder, which all ranks look up when the run is set up.

    Attributes:
        folder: The run's folder.
    """

    folder: Path

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Look the folder up."""
        self.folder = run_folder(trainer)

    @staticmethod
    def leaves_files(trainer: Trainer) -> bool:
        """Whether the run writes files: it does, unless it is but a trial (``fast_dev_run``)."""
        return not trainer.fast_dev_run  # type: ignore[attr-defined]

    @classmethod
    def writes(cls, trainer: Trainer) -> bool:
        """Whether this rank writes files: the first one does."""
        return trainer.is_global_zero and cls.leaves_files(trainer)


class FinalFilesCallback(RunFolderCallback, ABC):
    """A callback that writes files when training ends.

    A run that is taken up when all of its updates have been made, because it crashed in its last validation, has no
    end of training: then the end of ``fit`` is the time.
    """

    _has_written = False

    @abstractmethod
    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write; all ranks call it."""

    def on_fit_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Nothing is written yet."""
        self._has_written = False

    def on_train_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write."""
        self.write_final_files(trainer, pl_module)
        self._has_written = True

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write what no end of training has written."""
        if not self._has_written:
            pl_module.to(trainer.strategy.root_device)  # off which the trainer has taken it, and where shards meet
            self.write_final_files(trainer, pl_module)
