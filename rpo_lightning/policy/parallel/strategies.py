"""Chooses the placement and the gradient accumulation for a Lightning strategy. All strategies are listed here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.parallel.base import (
    GradientAccumulation,
    Placement,
    ReplicatedAccumulation,
    SingleDeviceAccumulation,
)
from rpo_lightning.policy.parallel.checkpoint_files import WholeCheckpointIO, write_folders_whole
from rpo_lightning.policy.parallel.deepspeed import (
    DeepSpeedAccumulation,
    DeepSpeedPlacement,
    PlainSteps,
    is_partitioned,
    whole_partitions,
)
from rpo_lightning.policy.parallel.fsdp2 import ShardedAccumulation, ShardedPlacement, whole_shards


def placement_for(trainer: Any) -> Placement:
    """The placement for a trainer's strategy; one device if there is no trainer."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedPlacement(trainer)
    if isinstance(strategy, DeepSpeedStrategy):
        return DeepSpeedPlacement(trainer)
    return Placement()


def prepare_strategy(trainer: Any) -> None:
    """Have a strategy write whole checkpoints, and change DeepSpeed's before it configures the model."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy):
        if "save_checkpoint" not in vars(strategy):  # an earlier stage of this trainer has changed it
            write_folders_whole(strategy)
    elif strategy is not None and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
    if isinstance(strategy, DeepSpeedStrategy) and strategy.config is not None:
        # For DeepSpeed's log only. Without it Lightning makes a training data loader to find it, even for evaluation.
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)
        strategy._forward_redirection = PlainSteps()


def whole_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Keep all parameters gathered: ranks may run different numbers of forward passes. All must enter and leave."""
    return whole_partitions(model) if is_partitioned(model) else whole_shards(model)


def accumulation_for(strategy: Strategy, module: Any) -> GradientAccumulation:
    """The gradient accumulation for a strategy.

    Raises:
        ConfigurationError: The strategy or the precision is not supported.
    """
    if str(module.trainer.precision).startswith("16"):
        raise ConfigurationError(
            f"trainer.precision={module.trainer.precision} scales the loss, so gradients would be clipped at a wrong "
            "norm: use bf16-mixed, bf16-true or 32-true"
        )
    if isinstance(strategy, ModelParallelStrategy):
        return ShardedAccumulation(module)
    if isinstance(strategy, DeepSpeedStrategy):
        return DeepSpeedAccumulation(module)
    if isinstance(strategy, DDPStrategy):
        return ReplicatedAccumulation(module)
    if isinstance(strategy, SingleDeviceStrategy):
        return SingleDeviceAccumulation(module)
    instead = "ModelParallelStrategy (FSDP2)" if isinstance(strategy, FSDPStrategy) else "ddp, ModelParallelStrategy"
    raise ConfigurationError(f"trainer.strategy={type(strategy).__name__} is not supported: use {instead} or deepspeed")
