"""Where a policy is loaded and how it is laid over ranks: one class for each kind of strategy.

A policy is whole while it is loaded and looked at (what attention it allows, a copy as the reference), and only then
sharded. Policies that are to be sharded are loaded on the CPU, by every process: a node needs memory for as many
copies as it has processes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from rpo_lightning.engines.weights import is_quantised
from rpo_lightning.errors import ConfigurationError
from rpo_lightning.sharding import require_data_parallel, shard
from rpo_lightning.zero import (
    PlainSteps,
    outside_init,
    partition,
    prepare_settings,
    to_computing_precision,
    zero_stage,
)


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


class DeepSpeedPlacement(Placement):
    """ZeRO.

    Args:
        trainer: Lightning's trainer, with a ``DeepSpeedStrategy``.
    """

    def __init__(self, trainer: Any) -> None:
        self.strategy = trainer.strategy
        prepare_settings(self.strategy.config, getattr(trainer.lightning_module, "max_grad_norm", None))

    def loading(self) -> AbstractContextManager[Any]:
        """As without DeepSpeed: on the CPU if the policy is to be partitioned."""
        return outside_init()

    def place(self, model: Any) -> None:
        """Partition under ZeRO-3; a reference, of which nothing trains, stays whole."""
        strategy = self.strategy
        to_computing_precision(model, strategy.config)
        if zero_stage(strategy.config) == 3 and any(p.requires_grad for p in model.parameters()):
            partition(model, strategy.config, strategy.root_device, strategy.remote_device)


def placement_for(trainer: Any) -> Placement:
    """The placement that goes with a trainer's strategy."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedPlacement(trainer)
    if isinstance(strategy, DeepSpeedStrategy):
        return DeepSpeedPlacement(trainer)
    return Placement()


def prepare_strategy(trainer: Any) -> None:
    """Set what a strategy has to know before it configures the model."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and strategy.config is not None:
        # For DeepSpeed's log only; Lightning would make a training data loader to ask for it, in evaluation too.
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)
        strategy._forward_redirection = PlainSteps()
