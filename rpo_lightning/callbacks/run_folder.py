"""Where a run's files go."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The logger's folder, or ``default_root_dir`` where there is no logger. All ranks must ask for it together."""
    return Path(trainer.log_dir or trainer.default_root_dir)
