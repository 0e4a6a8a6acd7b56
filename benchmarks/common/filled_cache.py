"""An experience cache that is full from the start: what RPO costs, without what filling the cache costs."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache.cache import CachedResponse, CacheEntry
from rpo_lightning.cache.cuts import CutStrategy
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh


class FixedCut(CutStrategy):
    """Cut the same number of tokens from every response."""

    def __init__(self, cut: int) -> None:
        self.cut = cut

    def prefix_length(self, entry: CacheEntry, response: CachedResponse, rng: np.random.Generator) -> int:
        """All but the cut."""
        return len(response) - self.cut


class FilledCache(ExperienceCacheCallback):
    """A cache that begins with a response of random tokens for every question."""

    def __init__(self, length: int, cut: int) -> None:
        super().__init__(
            cut=FixedCut(cut), refresh=EpsilonGreedyRefresh(0.0), initialisation="lazy", keep_unfinished=True
        )  # fmt: skip
        self.length = length

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Fill it."""
        generator = np.random.default_rng(0)
        for prompt in trainer.datamodule.prompts["train"]:  # type: ignore[attr-defined]
            ids = self.response(generator)
            self.cache.remember(prompt.uid, CachedResponse(ids, 0.0, True, True, ((0, self.length),)))

    def response(self, generator: np.random.Generator) -> np.ndarray:
        """A response's tokens."""
        return generator.integers(100, 40_000, self.length).astype(np.int32)
