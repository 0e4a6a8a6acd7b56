"""Where a run's files go."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


def run_folder(trainer: Trainer) -> Path:
    """The logger's folder, or ``default_root_dir`` where there is no logger. All ranks must ask for it together."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFolderCallback(Callback):
    """A callback that writes into the run's folder, which all ranks look up when the run is set up.

    Attributes:
        folder: The run's folder.
    """

    folder: Path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look the folder up."""
        self.folder = run_folder(trainer)

    @staticmethod
    def writes(trainer: Trainer) -> bool:
        """Whether this rank writes files: the first one does, unless the run is but a trial (``fast_dev_run``)."""
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


class FinalFilesCallback(RunFolderCallback):
    """A callback that writes files when training ends.

    A run that is taken up when all of its updates have been made, because it crashed in its last validation, has no
    end of training: then the end of ``fit`` is the time.
    """

    _has_written = False

    def write_final_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write; all ranks call it."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is written yet."""
        self._has_written = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self.write_final_files(trainer, pl_module)
        self._has_written = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what no end of training has written."""
        if not self._has_written:
            pl_module.to(trainer.strategy.root_device)  # off which the trainer has taken it, and where shards meet
            self.write_final_files(trainer, pl_module)
