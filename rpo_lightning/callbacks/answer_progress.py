"""Progress over questions, with tokens per second: a bar on a terminal, and a log line a minute elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from tqdm.auto import tqdm

from rpo_lightning.callbacks.progress_lines import MinuteLines

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


class AnswerBar:
    """A progress bar over questions; log lines where the output is no terminal.

    Args:
        task: Name of the task, shown before the bar.
        questions: Number of questions.
        visible: Whether this rank shows it.
    """

    def __init__(self, task: str, questions: int, visible: bool = True) -> None:
        self._bar = tqdm(total=questions, desc=task, unit="question", disable=None if visible else True)
        self._lines = MinuteLines() if visible and self._bar.disable else None
        self._task, self._questions, self._done = task, questions, 0
        self._start = time.monotonic()

    def update(self, questions: int, tokens: int) -> None:
        """Advance the bar.

        Args:
            questions: Questions answered since the last call.
            tokens: Tokens sampled since the bar was opened.
        """
        self._done += questions
        rate = round(tokens / max(time.monotonic() - self._start, 1e-9))
        self._bar.set_postfix({"tokens/s": rate}, refresh=False)
        self._bar.update(questions)
        if self._lines is not None:
            self._lines.say(f"{self._task}, question {self._done}/{self._questions}", f"tokens/s {rate}")

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
