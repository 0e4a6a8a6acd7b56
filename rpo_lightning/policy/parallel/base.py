"""What a strategy must provide, and the classes for one device and for DDP.

A :class:`Placement` says where a policy is loaded and how it is laid over the ranks. A policy is whole while it is
loaded and inspected (which attention it allows, a copy as the reference) and is sharded only then.

A :class:`GradientAccumulation` says how an update's gradient is accumulated, reduced over ranks, clipped and applied.
An update is several backward passes and one optimizer step; under manual optimisation Lightning leaves them to the
module. Three things must hold: gradients travel once an update, with the last pass; the norm is that of the whole
gradient, wherever its shards lie; a gradient that is not finite changes no parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from rpo_lightning.core.errors import UpdateError


class Placement:
    """The policy is whole on every rank's device."""

    def loading(self) -> AbstractContextManager[Any]:
        """What the policy is loaded and prepared in."""
        return nullcontext()

    def place(self, model: Any) -> None:
        """Lay the policy, or its reference, over the ranks."""


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
