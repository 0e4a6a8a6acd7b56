"""How an update's gradient is accumulated, reduced over ranks, clipped and applied: one class for each strategy.

An update is several backward passes and one optimizer step, which Lightning leaves to the module under manual
optimisation. What must not be wrong: gradients travel once an update, with the last pass; the norm is that of
the whole gradient, wherever its shards lie; and a gradient that is not finite changes no parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from rpo_lightning.errors import ConfigurationError, UpdateError


class GradientAccumulation(ABC):
    """Backward passes and the step that ends them.

    Args:
        module: The ``RPOModule``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute the loss of a micro-batch."""
        return compute()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of a micro-batch; with the last one, reduce over ranks."""
        with self._synchronising(is_last):
            self.module.manual_backward(loss)

    @abstractmethod
    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        """What a backward pass runs in."""

    def step(self, optimizer: Any, max_norm: float) -> float:
        """Clip, make the step, and return the norm before clipping.

        Raises:
            UpdateError: The norm is not finite; no parameter was changed.
        """
        total = clip_grad_norm_(self.module.policy.parameters(), max_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        self._require_finite(norm)
        optimizer.step()
        return norm

    def _require_finite(self, norm: float, update: int | None = None) -> None:
        if not math.isfinite(norm):
            update = self.module.global_step if update is None else update
            raise UpdateError(
                f"update {update}: the gradient norm is {norm}; the policy was left as it was. "
                "Lower the learning rate, or resume from an earlier checkpoint"
            )


class SingleDeviceAccumulation(GradientAccumulation):
    """One device: nothing to reduce."""

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()


class ReplicatedAccumulation(GradientAccumulation):
    """DDP: every rank has the whole policy; gradients are averaged while the last pass runs."""

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.module.trainer.strategy.model.no_sync()


class ShardedAccumulation(GradientAccumulation):
    """FSDP2: every rank has a shard of each parameter.

    Until the last pass gradients stay whole on every rank, unless ``module.accumulate_sharded`` has each pass
    reduce its own: as much traffic as there are passes, and the memory of a shard.
    """

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        self.module.policy.set_requires_gradient_sync(is_last or self.module.accumulate_sharded)
        self.module.policy.set_is_last_backward(is_last)
        return nullcontext()


class DeepSpeedAccumulation(GradientAccumulation):
    """ZeRO: DeepSpeed's engine reduces, clips and steps.

    It reduces the gradients of every pass (ZeRO-1: of the last one), since a rank keeps only its partition of them.

    The engine counts passes by its ``forward``: without one for every pass, ZeRO-3 would write each pass's gradients
    over those of the one before; hence :meth:`forward`.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.engine = module.trainer.strategy.deepspeed_engine
        self.engine.basic_optimizer.register_step_pre_hook(self._before_step)
        self._update = 0

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute the loss of a micro-batch within the engine's forward pass."""
        own = self.module.forward
        self.module.forward = compute
        try:
            loss: Tensor = self.engine()
        finally:
            self.module.forward = own
        return loss

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def step(self, optimizer: Any, max_norm: float) -> float:
        """Have the engine clip, at the ``max_norm`` it was set up with, and make the step."""
        self._update = self.module.global_step
        optimizer.step()
        if not self.engine.was_step_applied():  # the engine itself may look for what is not finite, and pass over it
            self._require_finite(math.nan, self._update)
        return float(self.engine.get_global_grad_norm())

    def _before_step(self, *_: Any) -> None:
        """The engine knows the norm, and has changed nothing yet; it writes -1 for what is not finite."""
        norm = float(self.engine.optimizer._global_grad_norm)
        self._require_finite(math.nan if norm < 0 else norm, self._update)


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
