"""Log lines that say how far a run is, for output that is a file: a bar would fill it with copies of itself."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rpo_lightning.callbacks.run_progress import named_figures

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0


class MinuteLines:
    """Logs a line at most once a minute, the first one a minute after it was made."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, *parts: str) -> None:
        """Log the parts with commas between them, unless the last line is too near."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            log.info(", ".join(parts))


class ProgressLinesCallback(Callback):
    """Logs updates or batches done, and the metrics that a progress bar would show, at most once a minute."""

    def __init__(self) -> None:
        self._lines = MinuteLines()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the updates of the run."""
        of_total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        self._log(trainer, f"training, update {trainer.global_step}{of_total}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the batches of a validation."""
        self._log(trainer, f"validating, batch {batch_idx + 1}")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the batches of a test."""
        self._log(trainer, f"testing, batch {batch_idx + 1}")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Log the batches of answers."""
        self._log(trainer, f"answering, batch {batch_idx + 1}")

    def _log(self, trainer: Trainer, done: str) -> None:
        if trainer.is_global_zero:
            self._lines.say(
                done, *(f"{n} {figure}" for n, figure in named_figures(trainer.progress_bar_metrics).items())
            )
