"""What an evaluation found, as files and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rpo_lightning.callbacks.run_folder import run_folder
from rpo_lightning.data import set_key
from rpo_lightning.evaluation import Estimate
from rpo_lightning.evaluation.evaluation import CONFIDENCE, average

RESULTS_FILE = "evaluation.parquet"
TABLE_FILE = "evaluation.md"


class EvaluationResultsCallback(Callback):
    """Writes every question's answers to ``evaluation.parquet`` and a table of the metrics to ``evaluation.md``.

    It does so at the end of ``test`` and ``validate``, in the run's folder; validations within ``fit`` only log.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print."""
        self._write(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, unless it is but a validation of a training run."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def _write(self, trainer: Trainer, module: Any, split: str) -> None:
        # All ranks take part in these three.
        folder = run_folder(trainer)
        estimates = {e.name: e.estimates() for e in module.evaluations if e.rows}
        rows = gather_rows([row for e in module.evaluations for row in e.rows], ("set", "uid"))
        if not estimates or not trainer.is_global_zero:
            return
        counts = {name: sum(row["set"] == name for row in rows) for name in estimates}
        unusable = getattr(getattr(trainer, "datamodule", None), "unusable", {})
        dropped = {name: unusable.get(set_key(split, name), []) for name in estimates}
        folder.mkdir(parents=True, exist_ok=True)
        _write_parquet(rows, folder / RESULTS_FILE)
        table = evaluation_table(estimates, counts, dropped)
        (folder / TABLE_FILE).write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\n\nanswers: {folder / RESULTS_FILE}\ntable:   {folder / TABLE_FILE}", flush=True)


def evaluation_table(
    estimates: dict[str, dict[str, Estimate]], counts: dict[str, int], dropped: dict[str, list[str]]
) -> str:
    """A Markdown table of the metrics of every set, and the rows that could not be used.

    Args:
        estimates: Metrics by set.
        counts: Questions by set.
        dropped: Messages about unusable rows by set.
    """
    columns = list(dict.fromkeys(metric for of_set in estimates.values() for metric in of_set))
    lines = [f"| set | questions | unusable rows | {' | '.join(columns)} |", "|" + " --- |" * (3 + len(columns))]
    rows = {name or "all": (str(counts[name]), str(len(dropped[name])), of_set) for name, of_set in estimates.items()}
    if len(estimates) > 1:
        rows["average"] = ("", "", average(estimates))
    for name, (count, unusable, of_set) in rows.items():
        cells = [_cell(metric, of_set.get(metric)) for metric in columns]
        lines.append(f"| {name} | {count} | {unusable} | {' | '.join(cells)} |")
    lines += ["", f"Means over questions, with bootstrap intervals of {CONFIDENCE:.0%}."]
    messages = [message for of_set in dropped.values() for message in of_set]
    if messages:
        lines += ["", "Rows that could not be used and were not scored:", "", *(f"- {m}" for m in messages)]
    return "\n".join(lines)


def _cell(metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if metric.endswith("tokens") else 3
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def gather_rows(rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all ranks, every key once: samplers repeat questions to give all ranks equally many."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, rows)
        rows = [row for of_rank in gathered for row in of_rank]
    return list({tuple(row[k] for k in key): row for row in rows}.values())


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.replace(path)
