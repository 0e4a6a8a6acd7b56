"""Progress bars over questions, with tokens per second. They are silent unless the output is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


class AnswerBar:
    """A progress bar over questions.

    Args:
        task: Name of the task, shown before the bar.
        questions: Number of questions.
        visible: Whether this rank shows the bar.
    """

    def __init__(self, task: str, questions: int, visible: bool = True) -> None:
        self._bar = tqdm(total=questions, desc=task, unit="question", disable=None if visible else True)

    def update(self, questions: int, tokens: int) -> None:
        """Advance the bar.

        Args:
            questions: Questions answered since the last call.
            tokens: Tokens sampled since the bar was opened.
        """
        self._bar.set_postfix({"tokens/s": round(tokens / max(self._bar.format_dict["elapsed"], 1e-9))}, refresh=False)
        self._bar.update(questions)

    def close(self) -> None:
        """Close the bar; it stays on the screen."""
        self._bar.close()


class AnswerProgressCallback(Callback):
    """Shows a bar over the questions of ``predict``.

    Args:
        task: Name of the task, shown before the bar.
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
        """Advance the bar by a batch."""
        assert self._bar is not None
        self._bar.update(len(batch), pl_module.decoded_tokens)

    def on_predict_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Close the bar."""
        assert self._bar is not None
        self._bar.close()
