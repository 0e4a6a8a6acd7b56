"""A run that ends when it has decoded enough: a callback for ``hard_questions.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from common.learning_curve import CurveRecorder

# What is kept of every iteration, under names of their own.
OF_ITERATIONS = {
    "rollout/informative_share": "informative_share",
    "rollout/zero_variance_share": "zero_variance_share",
    "rollout/all_wrong_share": "all_wrong_share",
    "cache/kept_share": "kept_share",
}


class BudgetedRun(CurveRecorder):
    """Notes every validation and every iteration, and stops the run once a number of tokens has been decoded.

    Args:
        path: JSON file that is written when the run ends.
        decoded_tokens: Tokens after which the run stops.
    """

    def __init__(self, path: str, decoded_tokens: int) -> None:
        super().__init__(path)
        self.budget = decoded_tokens
        self.iterations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
        """Count tokens, and stop when there are enough."""
        super().on_train_batch_end(trainer, pl_module, *arguments)
        metrics = {**trainer.callback_metrics, **pl_module.record.metrics}
        shares = {short: float(metrics[name]) for name, short in OF_ITERATIONS.items() if name in metrics}
        self.iterations.append({"decoded_tokens": self.decoded, **shares})
        if self.decoded >= self.budget:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """Write the curve and the iterations."""
        result = {"curve": list(self.points.values()), "iterations": self.iterations}
        Path(self.path).write_text(json.dumps(result))
