"""A callback that writes down what every rank has after every iteration, and can kill the run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from rpo_lightning import ExperienceCacheCallback
from tests.conftest import cache_contents


class RankRecorder(Callback):
    """Appends a line to ``rank-<n>.jsonl`` after every iteration.

    Args:
        folder: Where to.
        kill_after: The iteration after which every process kills itself, once the checkpoint is written.
        failing_ranks: Ranks that raise at the end of the second iteration.
    """

    def __init__(self, folder: str, kill_after: int = -1, failing_ranks: list[int] | None = None) -> None:
        self.folder = folder
        self.kill_after = kill_after
        self.failing_ranks = failing_ranks or []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """What the run starts with."""
        self._record(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """What an iteration left."""
        self._record(trainer, pl_module)
        if trainer.global_rank in self.failing_ranks and pl_module.iteration == 2:
            raise RuntimeError(f"rank {trainer.global_rank} fails")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Die as a machine does: before anything is cleaned up, but after the checkpoint."""
        if pl_module.iteration == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _record(self, trainer: Trainer, module: Any) -> None:
        (cache,) = [c for c in trainer.callbacks if isinstance(c, ExperienceCacheCallback)]  # type: ignore[attr-defined]
        contents = repr(cache_contents(cache.cache))
        line = {
            "iteration": module.iteration,
            "updates": trainer.global_step,
            "cache": hashlib.sha256(contents.encode()).hexdigest(),
            "questions": [g.request.prompt.uid for g in module.groups],
            "kept": [len(g.request.prefix_ids) for g in module.groups],
            "rollouts": [[list(c.token_ids) for c in g.completions] for g in module.groups],
        }
        with (Path(self.folder) / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
