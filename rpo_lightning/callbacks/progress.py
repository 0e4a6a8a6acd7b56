"""A progress bar over questions, with tokens per second; silent where the output is no terminal."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm


class AnswerProgressCallback(Callback):
    """Shows how far ``predict`` has come.

    Args:
        task: What the bar calls it.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._bar: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        questions = -(-len(data.prompts["predict"]) // trainer.world_size)
        batches: Any = trainer.num_predict_batches
        total = min(questions, int(sum(batches)) * data.eval_batch_size)
        self._bar = tqdm(total=total, desc=self.task, unit="question", disable=None if trainer.is_global_zero else True)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Move on."""
        module: Any = pl_module
        self._bar.update(len(batch))
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix({"tokens/s": round(module.decoded_tokens / max(elapsed, 1e-9))})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._bar.close()
