"""What a run knew after how much work: a callback for ``learning.py``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from rpo_lightning import ExperienceCacheCallback


class CurveRecorder(Callback):
    """Notes every validation with the work that led to it, filling the cache included, evaluation excluded.

    Args:
        path: JSON file that is written when the run ends.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.points: dict[int, dict[str, float]] = {}
        self.decoded = 0
        self.processed = 0
        self._seconds = 0.0
        self._since = 0.0

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock; an evaluation of the starting policy starts it anew, and the cache is filled after that."""
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Count tokens."""
        tokens = pl_module.record.phase_tokens
        self.decoded += tokens["decode"]
        self.processed += tokens["prefill"] + tokens["decode"] + tokens.get("update", 0)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking:
            self._seconds += time.process_time() - self._since

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Note a point of the curve."""
        caches = [c for c in trainer.callbacks if isinstance(c, ExperienceCacheCallback)]  # type: ignore[attr-defined]
        filled = sum(c.initialisation_tokens for c in caches)
        metrics = {
            k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")
        }
        self.points[trainer.global_step] = {
            "update": trainer.global_step,
            "decoded_tokens": self.decoded + filled,
            "processed_tokens": self.processed + filled,
            "cpu_seconds": self._seconds,
            **metrics,
        }
        self._since = time.process_time()

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """Write the curve."""
        Path(self.path).write_text(json.dumps(list(self.points.values())))
