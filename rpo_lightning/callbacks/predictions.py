"""Writes what ``rpo-lightning predict`` answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rpo_lightning.callbacks.run_folder import run_folder

PREDICTIONS_FILE = "predictions.jsonl"


class PredictionsCallback(BasePredictionWriter):
    """Writes one JSON line an answer to ``predictions.jsonl`` in the run's folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file of this rank."""
        name = PREDICTIONS_FILE if trainer.world_size == 1 else f"rank{trainer.global_rank}-{PREDICTIONS_FILE}"
        path = run_folder(trainer) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for batch in predictions for row in batch)
        print(f"{sum(len(batch) for batch in predictions)} answers written to {path}")
