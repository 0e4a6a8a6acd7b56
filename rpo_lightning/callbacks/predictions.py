"""Writes the answers of ``rpo-lightning predict``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rpo_lightning.callbacks.run_folder import RunFolderCallback, run_folder
from rpo_lightning.core.files import write_json_lines
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.core.run_files import PREDICTIONS_FILE

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


class PredictionsCallback(BasePredictionWriter):
    """Writes a JSON line for each answer to ``predictions.jsonl`` in the run's folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: RPOModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the answers of all ranks; a collective, rank 0 writes."""
        path = run_folder(trainer) / PREDICTIONS_FILE
        rows = gather_rows([row for batch in predictions for row in batch], ("uid", "sample"))
        if not RunFolderCallback.writes(trainer):
            return
        write_json_lines(rows, path)
        print(f"{len(rows)} answers written to {path}")
