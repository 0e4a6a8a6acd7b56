"""A callback that writes down what a run is made of: every iteration, and all that is left at its end."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rpo_lightning import ExperienceCacheCallback
from tests.conftest import cache_contents


class FinalState(Callback):
    """Appends a line to ``iterations-<rank>.jsonl`` after every iteration, and writes ``final-<rank>.pt`` at the end.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """What an iteration saw and left."""
        line = {
            "iteration": pl_module.iteration,
            "updates": trainer.global_step,
            "questions": [g.request.prompt.uid for g in pl_module.groups],
            "prefixes": [list(g.request.prefix_ids) for g in pl_module.groups],
            "rollouts": [[list(c.token_ids) for c in g.completions] for g in pl_module.groups],
            "rewards": [g.rewards for g in pl_module.groups],
            "cache": _digest(cache_contents(_cache(trainer).cache)),
            "generators": _digest([[*random.getstate()], torch.get_rng_state().tolist()]),
            "policy": _digest([p.detach().tolist() for p in pl_module.policy.parameters()]),
        }
        with (self.folder / f"iterations-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """What the run left."""
        cache = _cache(trainer)
        state = {
            "policy": pl_module.policy.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "cache": cache_contents(cache.cache),
            "initialisation_tokens": cache.initialisation_tokens,
            "iteration": pl_module.iteration,
            "updates": trainer.global_step,
            "buffer": pl_module.buffer.state_dict() if pl_module.buffer else None,
        }
        torch.save(state, self.folder / f"final-{trainer.global_rank}.pt")


def _cache(trainer: Trainer) -> ExperienceCacheCallback:
    return next(c for c in trainer.callbacks if isinstance(c, ExperienceCacheCallback))  # type: ignore[attr-defined]


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
