"""The progress bar of a run: how many updates are made, and two or three figures that fit on a line."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import override

# Metrics and what the bar calls them, in the order in which it shows them. Loggers keep the metrics' own names.
SHORT_NAMES = {"reward/mean": "reward", "val/accuracy": "accuracy", "rollout/tokens_per_second": "tokens/s"}
_LIGHTNINGS = ("lightning.pytorch", "lightning.fabric")


class RunProgressBar(TQDMProgressBar):
    """Shows updates out of ``max_steps`` where only that ends the run, and otherwise the batches of each epoch.

    It shows the metrics that are logged with ``prog_bar=True``, under short names. Log lines appear above the bar. The
    bar is closed when training ends or fails. As the trainer's first callback, it closes before others print.
    """

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"

    def __init__(self) -> None:
        super().__init__()
        self._log_above_bar = ExitStack()
        self._accuracy: dict[str, Any] = {}

    @property
    def sanity_check_description(self) -> str:
        """Name of the bar of the validation before training."""
        return "validating"

    @property
    def validation_description(self) -> str:
        """Name of the bar of a validation."""
        return "validating"

    @property
    def predict_description(self) -> str:
        """Name of the bar of ``predict``."""
        return "answering"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.set_description_str("training", refresh=False)
        if _counts_updates(trainer):
            bar.total, bar.initial, bar.n = trainer.max_steps, trainer.global_step, trainer.global_step
        if self.is_enabled:
            bar.set_postfix(self.get_metrics(trainer, pl_module))
            loggers = [logging.getLogger(name) for name in (None, "rpo_lightning", *_LIGHTNINGS)]
            with_handlers = [logger for logger in loggers if logger.handlers]
            self._log_above_bar.enter_context(logging_redirect_tqdm(with_handlers))

    @override
    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if _counts_updates(trainer):
            return  # the bar goes on
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        _restart(self.train_progress_bar, f"epoch {trainer.current_epoch + 1}{last}", self.total_train_batches)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not _counts_updates(trainer):
            super().on_train_batch_end(trainer, pl_module, *args)
        elif self.is_enabled:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    @override
    def on_train_end(self, *args: Any) -> None:
        super().on_train_end(*args)
        self._log_above_bar.close()

    @override
    def on_exception(self, *args: Any) -> None:
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()
        self._log_above_bar.close()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"validating {_name_of_set(trainer, 'val', dataloader_idx)}".strip()
            _restart(self.val_progress_bar, name, self.total_val_batches_current_dataloader)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_validation_batch_end(trainer, *args)
        _show_rate(self.val_progress_bar, trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning forgets the accuracy that was measured before training.
        self._accuracy = {k: v for k, v in trainer.callback_metrics.items() if k == "val/accuracy"}
        super().on_validation_end(trainer, pl_module)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"testing {_name_of_set(trainer, 'test', dataloader_idx)}".strip()
            _restart(self.test_progress_bar, name, self.total_test_batches_current_dataloader)

    @override
    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_test_batch_end(trainer, *args)
        _show_rate(self.test_progress_bar, trainer)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            _restart(self.predict_progress_bar, "answering", self.total_predict_batches_current_dataloader)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return dict(named_figures(self._accuracy | trainer.progress_bar_metrics))


def named_figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Metrics as a line shows them: short names first, numbers in three digits."""
    shown = {short: _figure(metrics[name]) for name, short in SHORT_NAMES.items() if name in metrics}
    further = {name: _figure(value) for name, value in metrics.items() if name not in SHORT_NAMES}
    return shown | {name: figure for name, figure in further.items() if name not in shown}


def _counts_updates(trainer: Trainer) -> bool:
    return trainer.max_epochs == -1 and trainer.max_steps > 0


def _restart(bar: tqdm, name: str, total: float) -> None:
    """Start a bar again for another epoch or another set of questions; an infinite total is not shown."""
    bar.set_description_str(name, refresh=False)
    bar.initial = 0
    bar.reset(None if math.isinf(total) else int(total))


def _name_of_set(trainer: Trainer, split: str, number: int) -> str:
    """The name of a set of evaluation questions; empty if there is only one, or the data module is another."""
    names: list[str] = getattr(getattr(trainer, "datamodule", None), "evaluation_names", lambda _: [])(split)
    return str(names[number]) if number < len(names) else ""


def _show_rate(bar: tqdm, trainer: Trainer) -> None:
    if "tokens/s" in trainer.progress_bar_metrics:
        bar.set_postfix({"tokens/s": _figure(trainer.progress_bar_metrics["tokens/s"])})


def _figure(value: Any) -> str:
    """Three digits of a number, as text: Lightning's bar appends zeros to numbers."""
    return tqdm.format_sizeof(float(value)) if abs(float(value)) >= 1000 else f"{float(value):.3g}"
