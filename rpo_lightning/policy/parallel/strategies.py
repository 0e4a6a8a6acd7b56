"""The one table from Lightning's strategies to what the policy needs on each of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

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
from rpo_lightning.policy.parallel.deepspeed import (
    DeepSpeedAccumulation,
    DeepSpeedPlacement,
    PlainSteps,
    is_partitioned,
    whole_partitions,
)
from rpo_lightning.policy.parallel.fsdp2 import ShardedAccumulation, ShardedPlacement, whole_shards


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


def whole_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Keep all parameters gathered: within, forward passes are no collectives. All ranks must enter and leave."""
    return whole_partitions(model) if is_partitioned(model) else whole_shards(model)


def accumulation_for(strategy: Strategy, module: Any) -> GradientAccumulation:
    """The accumulation that goes with a strategy.

    Raises:
        ConfigurationError: The strategy or the precision is not supported.
    """
    if str(module.trainer.precision).startswith("16"):
        raise ConfigurationError(
            f"trainer.precision={module.trainer.precision} scales the loss, and with it the gradients that are "
            "clipped: use bf16-mixed, bf16-true or 32-true"
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
