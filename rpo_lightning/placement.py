"""Where a policy is loaded and how it is laid over ranks: one class for each kind of strategy.

A policy is whole while it is loaded and looked at (what attention it allows, a copy as the reference), and only then
sharded. Policies that are to be sharded are loaded on the CPU, by every process: a node needs memory for as many
copies as it has processes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from rpo_lightning.engines.weights import is_quantised
from rpo_lightning.errors import ConfigurationError
from rpo_lightning.sharding import require_data_parallel, shard


class Placement:
    """The policy is whole on every rank's device."""

    def loading(self) -> AbstractContextManager[Any]:
        """What the policy is loaded and prepared in."""
        return nullcontext()

    def place(self, model: Any) -> None:
        """Lay the policy, or its reference, over the ranks."""


class ShardedPlacement(Placement):
    """FSDP2.

    Args:
        trainer: Lightning's trainer, with a ``ModelParallelStrategy``.
    """

    def __init__(self, trainer: Any) -> None:
        self.mesh = require_data_parallel(trainer.strategy)
        self.precision = str(trainer.precision)

    def loading(self) -> AbstractContextManager[Any]:
        """The CPU."""
        return torch.device("cpu")

    def place(self, model: Any) -> None:
        """Shard layer by layer.

        Raises:
            ConfigurationError: The model's weights are quantised.
        """
        if any(is_quantised(parameter) for parameter in model.parameters()):
            raise ConfigurationError(
                "model.adapter.quantization does not go with ModelParallelStrategy, which cannot split quantised "
                "weights: use trainer.strategy=ddp, or leave them unquantised"
            )
        shard(model, self.mesh, self.precision)


def placement_for(trainer: Any) -> Placement:
    """The placement that goes with a trainer's strategy."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedPlacement(trainer)
    return Placement()
