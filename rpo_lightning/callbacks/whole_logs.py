"""Keeps the logs of a run that is stopped and resumed whole.

Lightning logs an update after the callbacks have written a checkpoint of it. If the run is killed in between, no run
logs that update: the resumed one goes on with the next. And Lightning takes a validation for done that was due when a
checkpoint was written, and skips it when it resumes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from rpo_lightning.core.files import Unwritten, append, replacing

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

MOST_ROWS_KEPT = 10_000


class WholeMetrics(ExperimentWriter):
    """Writes ``metrics.csv`` so that what is on the disk stays whole.

    Lightning empties the file and writes it again when a metric appears that it does not have yet. A run that is killed
    then, or whose disk is full, would lose all rows. Rows that cannot be written are kept for the next time.
    """

    unwritten = Unwritten()

    _last = ""
    _written_keys: Sequence[str] = ()

    @override
    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        row = repr((step, sorted(metrics_dict.items())))
        if row != self._last:  # Lightning logs an update of which there is a checkpoint once more
            super().log_metrics(metrics_dict, step)
        self._last = row

    @override
    def save(self) -> None:
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        with self.unwritten.goes_on(path, "its rows are kept for the next time"):
            self._record_new_keys()
            if self._written_keys != self.metrics_keys or not path.exists():
                table = self._table([*_rows_of(path), *self.metrics], with_header=True)
                with replacing(path) as partial:
                    partial.write_text(table, newline="")
            else:
                append(path, self._table(self.metrics, with_header=False))
            self.metrics, self._written_keys = [], [*self.metrics_keys]
        del self.metrics[:-MOST_ROWS_KEPT]

    def _table(self, rows: Sequence[Mapping[str, Any]], with_header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        if with_header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class WholeLogsCallback(Callback):
    """Logs an update before a checkpoint of it, and makes up for a validation. ``RPOModule`` adds one itself."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._is_validating = False
        self._is_due = False

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Note the trainer, whose progress says whether a validation is due."""
        self._trainer = trainer
        self._is_validating = self._is_due = False
        for logger in trainer.loggers:
            if (
                isinstance(logger, CSVLogger)
                and type(logger.experiment) is ExperimentWriter
                and "://" not in logger.log_dir
            ):
                logger.experiment.__class__ = WholeMetrics  # it has made its folder already

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Validate if the checkpoint's run was about to, or had not finished."""
        self._make_up(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Do so if nothing was left to train: Lightning skips ``on_train_start`` then."""
        if self._is_due:
            pl_module.to(trainer.strategy.root_device)
        self._make_up(trainer)

    def _make_up(self, trainer: Trainer) -> None:
        if self._is_due:
            self._is_due = False
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_validation_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Note that a validation has begun."""
        self._is_validating = not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Note that it has ended: its metrics are logged before the next hook."""
        self._is_validating = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: RPOModule, checkpoint: dict[str, Any]) -> None:
        """Log the update that the checkpoint holds, before it is written."""
        connector = trainer._logger_connector
        tables = [logger for logger in trainer.loggers if isinstance(_writer(logger), WholeMetrics)]
        if tables and self._is_at_batch_end() and connector.should_update_logs:
            row = convert_tensors_to_scalars(connector.metrics["log"])
            for logger in tables:
                logger.log_metrics(
                    {"epoch": trainer.current_epoch, **row}, trainer.fit_loop.epoch_loop._batches_that_stepped
                )
                logger.save()

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is due at this point."""
        return {"validation_is_due": self._is_validating or self._will_validate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was due."""
        self._is_due = state_dict["validation_is_due"]

    def _will_validate(self) -> bool:
        """Whether the update that is being finished is followed by a validation."""
        trainer = self._trainer
        if not self._is_at_batch_end() or not sum(trainer.num_val_batches or [0]):
            return False
        return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))

    def _is_at_batch_end(self) -> bool:
        """Whether the callbacks are told of the end of an update, which Lightning logs after that."""
        if self._trainer is None or not self._trainer.training:
            return False
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed > progress.completed)


def _writer(logger: Logger) -> Any:
    return logger.experiment if isinstance(logger, CSVLogger) else None
