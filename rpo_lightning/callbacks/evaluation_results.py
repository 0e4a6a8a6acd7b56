"""Writes and prints the results of ``validate`` and ``test``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rpo_lightning.callbacks.run_folder import RunFolderCallback
from rpo_lightning.core.files import replacing, write_parquet
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.core.run_files import EVALUATION_FILE, EVALUATION_TABLE
from rpo_lightning.data.prompts import LoadReport
from rpo_lightning.data.question_sets import set_key
from rpo_lightning.evaluation import Estimate
from rpo_lightning.evaluation.evaluation import CONFIDENCE, average

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

# Rows that were not scored, of which the table names at most so many.
_MOST_MESSAGES = 50


class EvaluationResultsCallback(RunFolderCallback):
    """Writes every question's answers to ``evaluation.parquet`` and a table of the metrics to ``evaluation.md``.

    It does so in the run's folder at the end of ``test`` and ``validate``. Validations of ``fit`` are only logged.
    """

    def on_test_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files and print the table."""
        self._write(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the files and print the table, unless the validation is part of ``fit``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def _write(self, trainer: Trainer, module: RPOModule, split: str) -> None:
        # Collectives: all ranks call them.
        estimates = {e.name: e.estimates() for e in module.evaluations if e.questions}
        rows = gather_rows([row for e in module.evaluations for row in e.rows], ("set", "uid"))
        if not estimates or not trainer.is_global_zero:
            return
        counts = {name: sum(row["set"] == name for row in rows) for name in estimates}
        of_sets = getattr(getattr(trainer, "datamodule", None), "reports", {})
        reports = {name: of_sets.get(set_key(split, name), LoadReport()) for name in estimates}
        table = evaluation_table(estimates, counts, reports)
        print(f"\n{table}", flush=True)
        if not self.writes(trainer):
            return
        write_parquet(rows, self.folder / EVALUATION_FILE)
        with replacing(self.folder / EVALUATION_TABLE) as partial:
            partial.write_text(table + "\n", encoding="utf-8")
        print(f"\nanswers: {self.folder / EVALUATION_FILE}\ntable:   {self.folder / EVALUATION_TABLE}", flush=True)


def evaluation_table(
    estimates: dict[str, dict[str, Estimate]], counts: dict[str, int], reports: dict[str, LoadReport]
) -> str:
    """Make a Markdown table of the metrics of every set, and list the rows that were not scored.

    Args:
        estimates: Metrics by set.
        counts: Questions by set.
        reports: How many rows of each set were dropped, and why.
    """
    columns = list(dict.fromkeys(metric for of_set in estimates.values() for metric in of_set))
    lines = [f"| set | questions | rows not scored | {' | '.join(columns)} |", "|" + " --- |" * (3 + len(columns))]
    rows = {name or "all": (str(counts[name]), str(reports[name].dropped), e) for name, e in estimates.items()}
    if len(estimates) > 1:
        rows["average"] = ("", "", average(estimates))
    for name, (count, unusable, of_set) in rows.items():
        cells = [_cell(metric, of_set.get(metric)) for metric in columns]
        lines.append(f"| {name} | {count} | {unusable} | {' | '.join(cells)} |")
    lines += ["", f"Means over questions, with bootstrap intervals of {CONFIDENCE:.0%}."]
    messages = [message for report in reports.values() for message in report.messages()]
    if messages:
        lines += ["", "Not scored:", "", *(f"- {m}" for m in messages[:_MOST_MESSAGES])]
    if len(messages) > _MOST_MESSAGES:
        lines.append(f"- and {len(messages) - _MOST_MESSAGES} more")
    return "\n".join(lines)


def _cell(metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if metric.endswith("tokens") else 3
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
