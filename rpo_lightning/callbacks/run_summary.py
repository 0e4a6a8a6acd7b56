"""Summarises a run on the screen and in a file: accuracy before and after, tokens, seconds.

Accuracy is measured on the validation set without a prefix: before the first update, if
``trainer.num_sanity_val_steps`` is -1, and after the last one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rpo_lightning.callbacks.experience_cache import ExperienceCacheCallback
from rpo_lightning.callbacks.export import HuggingFaceExportCallback
from rpo_lightning.callbacks.run_folder import RunFolderCallback
from rpo_lightning.core.files import replacing
from rpo_lightning.core.run_files import CACHE_FILE, METRICS_FILE, POLICY_FOLDER, SUMMARY_FILE
from rpo_lightning.core.timing import PHASES
from rpo_lightning.update.metrics import IterationRecord

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

Number = TypeVar("Number", int, float)


class RunSummaryCallback(RunFolderCallback):
    """Counts tokens, remembers accuracies, and writes ``summary.json`` into the run's folder.

    It also asks for a validation after the last update. There is none if ``check_val_every_n_epoch`` skips that epoch.
    """

    leaves_final_files = True

    def __init__(self) -> None:
        self.decoded_tokens = 0
        self.responses = 0
        self.gradings_killed = 0
        self.gradings_failed = 0
        self.skipped_updates = 0
        self.idle_tokens: int | None = 0  # None: unknown, since the run began with a release that did not count them
        self.seconds = 0.0
        self.accuracies: list[tuple[int, float]] = []
        self.full_path_tokens: list[float] = []
        self.phase_seconds: dict[str, float] = {}
        self.phase_tokens: dict[str, int] = {}
        self._started: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Remember the accuracy of a validation, and log that of the sanity check, which Lightning does not log."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if "val/accuracy" not in metrics or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return  # it answered fewer questions than the later validations
        self.accuracies.append((trainer.global_step, metrics["val/accuracy"]))
        self.full_path_tokens.append(metrics["val/response_tokens"])
        if trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens and seconds, and end the run with a validation after the last batch."""
        record: IterationRecord = pl_module.record
        self.decoded_tokens += record.phase_tokens["decode"]
        self.responses += record.responses
        self.gradings_killed += record.killed
        self.gradings_failed += record.failed
        self.skipped_updates += record.skipped
        if self.idle_tokens is not None:
            self.idle_tokens += record.idle_tokens
        _add(self.phase_seconds, record.phase_seconds)
        _add(self.phase_tokens, record.phase_tokens)
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if 0 < trainer.max_steps <= trainer.global_step or (last_epoch and trainer.is_last_batch):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Add the seconds after the last iteration's record, in which the cache was refreshed."""
        _add(self.phase_seconds, pl_module.timer.take())

    def on_fit_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write and print the summary."""
        self.seconds, self._started = self._seconds_so_far(), None
        if not trainer.is_global_zero:
            return
        summary = self.summary(trainer)
        if self.writes(trainer):
            path = self.folder / SUMMARY_FILE
            with self.unwritten.goes_on(path, "it is printed"), replacing(path) as partial:
                partial.write_text(json.dumps(summary, indent=2) + "\n")
        print(_screen(summary, self._files(trainer)), flush=True)

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """Collect the figures of the run so far."""
        caches = [c for c in trainer.callbacks if isinstance(c, ExperienceCacheCallback)]  # type: ignore[attr-defined]
        initialisation = sum(c.initialisation_tokens for c in caches)
        before = next((accuracy for step, accuracy in self.accuracies if step == 0), None)
        after = next((a for step, a in reversed(self.accuracies) if step == trainer.global_step), None)
        return {
            "accuracy_before": before,
            "accuracy_after": after,
            "updates": trainer.global_step,
            "skipped_updates": self.skipped_updates,
            "samples": self.responses,
            "gradings_killed": self.gradings_killed,
            "gradings_failed": self.gradings_failed,
            "decoded_tokens_per_sample": self.decoded_tokens / max(self.responses, 1),
            "full_path_tokens_per_sample": (
                sum(self.full_path_tokens) / len(self.full_path_tokens) if self.full_path_tokens else None
            ),
            "decoded_tokens": self.decoded_tokens,
            "idle_decoding_share": (
                self.idle_tokens / self.decoded_tokens if self.idle_tokens is not None and self.decoded_tokens else None
            ),
            "initialisation_tokens": initialisation,
            "total_tokens": self.decoded_tokens + initialisation,
            "seconds": self.seconds,
            "phases": self._phases(caches),
        }

    def _seconds_so_far(self) -> float:
        return self.seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def _phases(self, caches: list[ExperienceCacheCallback]) -> dict[str, dict[str, float | int | None]]:
        """Seconds and tokens of each phase, over all training iterations."""
        seconds, tokens = dict(self.phase_seconds), dict(self.phase_tokens)
        if caches:
            seconds["initialise"] = sum(c.initialisation_seconds for c in caches)
            tokens["initialise"] = sum(c.initialisation_tokens for c in caches)
        return {p: {"seconds": seconds[p], "tokens": tokens.get(p)} for p in PHASES if p in seconds}

    def state_dict(self) -> dict[str, Any]:
        """Counts for the checkpoint: the summary of a resumed run covers the whole run."""
        return {
            "decoded_tokens": self.decoded_tokens,
            "samples": self.responses,
            "gradings_killed": self.gradings_killed,
            "gradings_failed": self.gradings_failed,
            "skipped_updates": self.skipped_updates,
            "idle_tokens": self.idle_tokens,
            "seconds": self._seconds_so_far(),
            "accuracies": self.accuracies,
            "full_path_tokens": self.full_path_tokens,
            "phase_seconds": self.phase_seconds,
            "phase_tokens": self.phase_tokens,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.decoded_tokens = state_dict["decoded_tokens"]
        self.responses = state_dict["samples"]
        # Checkpoints of earlier releases do not say what was lost, nor which tokens taught nothing.
        self.gradings_killed = state_dict.get("gradings_killed", 0)
        self.gradings_failed = state_dict.get("gradings_failed", 0)
        self.skipped_updates = state_dict.get("skipped_updates", 0)
        self.idle_tokens = state_dict.get("idle_tokens")
        self.seconds = state_dict["seconds"]
        self.accuracies = [(int(step), float(accuracy)) for step, accuracy in state_dict["accuracies"]]
        self.full_path_tokens = list(state_dict["full_path_tokens"])
        self.phase_seconds = dict(state_dict["phase_seconds"])
        self.phase_tokens = dict(state_dict["phase_tokens"])

    def _files(self, trainer: Trainer) -> dict[str, Path]:
        """The files that the run wrote, by kind. A logger may have another folder than the run."""
        if not self.writes(trainer):
            return {}
        kinds = {type(c) for c in trainer.callbacks}  # type: ignore[attr-defined]
        files = {}
        if HuggingFaceExportCallback in kinds:
            files["policy"] = self.folder / POLICY_FOLDER
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                files["metrics"] = Path(logger.log_dir) / METRICS_FILE
        if ExperienceCacheCallback in kinds:
            files["cache"] = self.folder / CACHE_FILE
        files["summary"] = self.folder / SUMMARY_FILE
        return {name: path for name, path in files.items() if path.exists()}


def _add(totals: dict[str, Number], further: dict[str, Number]) -> None:
    for phase, amount in further.items():
        totals[phase] = totals.get(phase, 0) + amount


def _screen(summary: dict[str, Any], files: dict[str, Path]) -> str:
    def number(key: str, form: str) -> str:
        value = summary[key]
        return "not measured" if value is None else format(value, form)

    lines = [
        "",
        f"held-out accuracy without a prefix   {number('accuracy_before', '.3f')} before, "
        f"{number('accuracy_after', '.3f')} after {summary['updates']} updates",
        f"decoded tokens per sample            {number('decoded_tokens_per_sample', '.1f')} "
        f"(full path: {number('full_path_tokens_per_sample', '.1f')})",
        f"decoded tokens in all                {summary['total_tokens']:,}, of which "
        f"{summary['initialisation_tokens']:,} filled the cache",
        f"decoding that taught nothing         {number('idle_decoding_share', '.1%')}",
        f"seconds                              {number('seconds', '.0f')}",
    ]
    lines += [f"{name:<36} {path}" for name, path in files.items()]
    return "\n".join([*lines, *_phase_table(summary["phases"])])


def _phase_table(phases: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: seconds, share and tokens of each phase of the training iterations."""
    total = sum(phase["seconds"] for phase in phases.values()) or 1.0
    lines = ["", f"{'phase':<20}{'seconds':>10}{'share':>8}{'tokens':>14}"]
    for name, phase in phases.items():
        tokens = "" if phase["tokens"] is None else f"{phase['tokens']:,}"
        lines.append(f"{name:<20}{phase['seconds']:>10.1f}{phase['seconds'] / total:>8.1%}{tokens:>14}")
    return lines
