"""Logs sample completions: a file of the run, and tables in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import json
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from rpo_lightning.callbacks.run_folder import RunFolderCallback
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.files import append
from rpo_lightning.core.run_files import COMPLETIONS_FILE, EARLIER_COMPLETIONS_FILE
from rpo_lightning.core.types import Group
from rpo_lightning.policy.tokenizer import decode

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

LARGEST_FILE = 2**26  # bytes
COLUMNS = ("step", "uid", "prompt", "answer", "prefix", "suffix", "reward", "correct", "finished")


class CompletionsCallback(RunFolderCallback):
    """Logs some completions of a training batch, with prefix and suffix in columns of their own.

    Appends rows to ``completions.jsonl`` in the run's folder. Beyond 64 MiB the file becomes
    ``completions-earlier.jsonl``, and the one of that name goes. TensorBoard, Weights & Biases and MLflow
    get a table.

    Args:
        every_n_batches: Training batches from one log to the next.
        groups: Groups to log each time.
        members: Members to log of each group: the best, the worst, the second best, and so on.

    Raises:
        ConfigurationError: A number is below 1.
    """

    def __init__(self, every_n_batches: int = 10, groups: int = 2, members: int = 2) -> None:
        if min(every_n_batches, groups, members) < 1:
            raise ConfigurationError(
                "completions.every_n_batches, completions.groups and completions.members must be at least 1, got "
                f"{every_n_batches}, {groups} and {members}"
            )
        self.every_n_batches = every_n_batches
        self.groups = groups
        self.members = members

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log some completions of the batch, if it is one in ``every_n_batches``."""
        if not self.writes(trainer) or (pl_module.iteration - 1) % self.every_n_batches:
            return
        rows = [row for g in pl_module.groups[: self.groups] for row in self._rows(g, pl_module.tokenizer)]
        path = self.folder / COMPLETIONS_FILE
        with self.unwritten.goes_on(path, "these completions are not logged"):
            if path.exists() and path.stat().st_size > LARGEST_FILE:
                path.replace(path.with_name(EARLIER_COMPLETIONS_FILE))
            append(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", _markdown(rows), pl_module.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_table("completions", list(COLUMNS), [[row[c] for c in COLUMNS] for row in rows])
            elif isinstance(logger, MLFlowLogger):  # a file each: MLflow writes a table whole, however long
                table = {c: [row[c] for row in rows] for c in COLUMNS}
                logger.experiment.log_table(logger.run_id, table, f"completions/step-{pl_module.global_step:06d}.json")

    def _rows(self, group: Group, tokenizer: Any) -> list[dict[str, Any]]:
        order = sorted(range(len(group.rewards)), key=lambda i: group.rewards[i])
        alternating = [order[-1 - i // 2] if i % 2 == 0 else order[i // 2] for i in range(len(order))]
        decoded = group.request.prompt.opening + decode(tokenizer, group.request.prefix_ids)
        responses = [sample.response for sample in group.samples]
        # A character may begin in the prefix and end in the suffix: it belongs to the suffix.
        prefixes = [commonprefix((decoded, response)) for response in responses]  # noqa: RUF071 (these are texts)
        return [
            {
                "step": group.step,
                "uid": group.request.prompt.uid,
                "prompt": group.request.prompt.text,
                "answer": group.request.prompt.answer,
                "prefix": prefixes[i],
                "suffix": responses[i].removeprefix(prefixes[i]),
                "reward": group.rewards[i],
                "correct": group.samples[i].is_correct,
                "finished": group.completions[i].finished,
            }
            for i in alternating[: self.members]
        ]


def _markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", "<br>")

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)
