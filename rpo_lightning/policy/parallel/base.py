"""What the policy needs from a strategy, and the classes for one device and for DDP.

A ``Placement`` says where a policy is loaded and how it is spread over the ranks. A policy is whole while it is
loaded, inspected (which attention it allows) and copied as the reference. It is sharded after that.

A ``GradientAccumulation`` says how an update's gradient is accumulated, reduced over ranks, clipped and applied.
An update is several backward passes and one optimizer step. Under manual optimisation the module makes them, not
Lightning. Every class must ensure three things:

* Gradients travel between ranks once an update, with the last pass.
* The norm is that of the whole gradient, wherever its shards lie.
* A gradient that is not to be used, or is not finite, changes neither parameters nor the optimizer's state.
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


class Placement:
    """One device and DDP: the policy is whole on every rank's device.

    Attributes:
        holds_contexts: Whether several backward passes may continue one graph. Not with FSDP2 and DeepSpeed, whose
            hooks expect a backward pass after each forward pass.
    """

    holds_contexts = True

    def loading(self) -> AbstractContextManager[Any]:
        """A context in which to load and prepare the policy."""
        return nullcontext()

    def place(self, model: Any) -> None:
        """Spread the policy, or its reference, over the ranks, in place."""


class GradientAccumulation(ABC):
    """The backward passes and the optimizer step of an update.

    Args:
        module: The ``RPOModule``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Call ``compute``, which returns the loss of a micro-batch."""
        return compute()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of a micro-batch. After the last one of an update, reduce the sum over ranks."""
        with self._synchronising(is_last):
            self.module.manual_backward(loss)

    @abstractmethod
    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        """A context in which to run a backward pass."""

    def step(self, optimizer: Any, max_norm: float, is_usable: bool = True) -> float:
        """Clip the gradient to ``max_norm`` and make the step, unless the gradient is not usable or not finite.

        Args:
            optimizer: The optimizer.
            max_norm: Limit of the norm.
            is_usable: Whether to make the step at all; the same on all ranks.

        Returns:
            The norm before clipping, the same on all ranks.
        """
        total = clip_grad_norm_(self.module.policy.parameters(), max_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if is_usable and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # the rollout needs the memory
        return norm


class SingleDeviceAccumulation(GradientAccumulation):
    """One device: nothing to reduce."""

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()


class ReplicatedAccumulation(GradientAccumulation):
    """DDP: every rank has the whole policy. Gradients are averaged during the last pass."""

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.module.trainer.strategy.model.no_sync()
