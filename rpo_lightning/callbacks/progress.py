"""A progress bar over questions, with tokens per second; silent where the output is no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


class AnswerBar:
    """A bar over questions.

    Args:
        task: What the bar calls it.
        questions: How many there are.
        visible: Whether this rank shows it.
    """

    def __init__(self, task: str, questions: int, visible: bool = True) -> None:
        self._bar = tqdm(total=questions, desc=task, unit="question", disable=None if visible else True)

    def update(self, questions: int, tokens: int) -> None:
        """Move on.

        Args:
            questions: Answered since the last call.
            tokens: Sampled since the bar was opened.
        """
        self._bar.set_postfix({"tokens/s": round(tokens / max(self._bar.format_dict["elapsed"], 1e-9))}, refresh=False)
        self._bar.update(questions)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class AnswerProgressCallback(Callback):
    """Shows how far ``predict`` has come.

    Args:
        task: What the bar calls it.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._bar: AnswerBar | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Open the bar."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        questions = -(-len(data.prompts["predict"]) // trainer.world_size)
        batches: Any = trainer.num_predict_batches
        total = min(questions, int(sum(batches)) * data.eval_batch_size)
        self._bar = AnswerBar(self.task, total, trainer.is_global_zero)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, *_: Any) -> None:
        """Move on."""
        assert self._bar is not None
        self._bar.update(len(batch), pl_module.decoded_tokens)

    def on_predict_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Close the bar."""
        assert self._bar is not None
        self._bar.close()
