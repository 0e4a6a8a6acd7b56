"""Finds the folder of a run's files and the checkpoints of earlier runs; base classes of callbacks that write files."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from rpo_lightning.core.checkpoint_file import require_checkpoint
from rpo_lightning.core.errors import ConfigurationError, RunFileError, one_line
from rpo_lightning.core.files import Unwritten
from rpo_lightning.policy.parallel.checkpoint_files import checkpoints_in, newest_whole

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


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


def last_checkpoint(trainer: Trainer, to_train: bool = True) -> Path | None:
    """The newest checkpoint of this run and of the experiment's earlier runs that can be taken.

    Its name does not matter: a run that was killed may have written a newer one than its ``last.ckpt``. Warns of newer
    ones that are damaged, or that hold too little to train on. Lightning looks only into the folder of the new run.
    That folder is empty unless ``ModelCheckpoint.dirpath`` is set.

    Args:
        trainer: The trainer.
        to_train: Whether training is to go on from it; otherwise weights suffice.
    """
    folders: set[Path] = set()
    found: set[Path] = set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, OnExceptionCheckpoint):
            found.add(Path(callback.ckpt_path))
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            folders.add(Path(callback.dirpath))
    for folder in (*(run / "checkpoints" for run in experiment_runs(trainer)), *folders):
        found |= checkpoints_in(folder)
    hpc = trainer._checkpoint_connector._hpc_resume_path  # which Lightning writes before SLURM requeues a job
    if hpc is not None:
        found.add(Path(hpc))

    def lacks(path: Path) -> str | None:
        try:
            require_checkpoint(path, to_train, takes_folders=True)
        except ConfigurationError as error:
            return one_line(error)
        return None

    return newest_whole(found, log.warning, lacks)


def experiment_runs(trainer: Trainer) -> list[Path]:
    """The folders of this run and of the experiment's other runs; a collective."""
    others = [] if trainer.logger is None else _experiment_folder(trainer, trainer.logger).glob("*/")
    return [run_folder(trainer), *others]


def run_checkpoints(trainer: Trainer) -> Path:
    """The folder in which ``ModelCheckpoint`` puts this run's checkpoints; a collective."""
    return run_folder(trainer) / "checkpoints"


class RunFolderCallback(Callback):
    """A callback that writes into the run's folder.

    Attributes:
        folder: The run's folder, from ``setup`` on.
        unwritten: The files that could not be written.
        leaves_final_files: Whether its files are to be there after training, or the run ends with an error.
    """

    folder: Path
    unwritten: Unwritten
    leaves_final_files = False

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Look the run's folder up; a collective."""
        self.folder, self.unwritten = run_folder(trainer), Unwritten()

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
    files are then written in ``on_fit_end``. So are those that could not be written before.
    """

    leaves_final_files = True
    _has_written = False

    @abstractmethod
    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files; a collective. A file that cannot be written goes to ``unwritten``."""

    def on_fit_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Note that the files are still to be written."""
        self._has_written = False

    def on_train_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files."""
        self.write_final_files(trainer, pl_module)
        self._has_written = not pl_module.ranks.most(len(self.unwritten.causes))

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files if ``on_train_end`` was skipped or could not write them."""
        if not self._has_written:
            pl_module.to(
                trainer.strategy.root_device
            )  # Lightning moved it to the CPU; gathering shards needs the device
            self.write_final_files(trainer, pl_module)


def require_final_files(trainer: Trainer) -> None:
    """Check that the files which are to be there after training could be written.

    Raises:
        RunFileError: One of them could not.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolderCallback) and callback.leaves_final_files:
            for path, cause in callback.unwritten.causes.items():
                raise RunFileError(
                    f"{path}: could not be written ({cause}). Make room, or mend its folder; the same command with "
                    "--ckpt_path last then writes it"
                )
