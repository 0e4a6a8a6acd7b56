"""DeepSpeed's ZeRO: what its settings must be, a policy in partitions, and whole again for a while.

A policy is loaded whole, tried and copied as without DeepSpeed, and partitioned parameter by parameter afterwards:
``zero.Init``, in which Lightning configures models under ZeRO-3, is left meanwhile. So a node needs CPU memory for as
many policies as it has processes, and a GPU never holds a whole one. Under ZeRO-1 and 2 the policy is loaded on the
GPU, where it is whole anyway. A reference policy stays whole on every rank, in what DeepSpeed computes in.

Checkpoints are DeepSpeed's folders; they are taken up by as many ranks as wrote them, and DeepSpeed refuses others.
To go on with another number of ranks, start from the exported policy. Where the optimizer is offloaded, DeepSpeed
demands ``model.optimizer: deepspeed.ops.adam.DeepSpeedCPUAdam``.

Lightning lets DeepSpeed run on CUDA only. The tests replace that check and run ZeRO-2 and ZeRO-3 on two processes on
the CPU; nothing here has been run on CUDA yet, nor with ZeRO-1, offloading or NVMe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.parallel.base import GradientAccumulation, Placement
from rpo_lightning.policy.weights import is_quantised


class PlainSteps(_ForwardRedirection):
    """Has Lightning call the steps of a module as they are, not within the engine's forward pass.

    A step here has a rollout in it, many forward passes or none. The engine's forward pass is that of a micro-batch;
    around a whole step, it would set out to gather the first layers for a pass that does not come.
    """

    def __call__(self, wrapper_module: Any, original_module: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        return getattr(original_module, method_name)(*args, **kwargs)


def zero_stage(config: dict[str, Any]) -> int:
    """The stage of a DeepSpeed configuration; 0 if ZeRO is off."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def prepare_settings(config: dict[str, Any], max_norm: float | None) -> None:
    """Check a DeepSpeed configuration and have it clip gradients at the module's limit.

    Args:
        config: The configuration; changed in place.
        max_norm: ``model.update.max_grad_norm``; ``None`` for a module that does not train.

    Raises:
        ConfigurationError: A setting that the module's update cannot work with.
    """
    if zero_stage(config) == 0:
        raise ConfigurationError("trainer.strategy deepspeed with ZeRO off (stage 0) is not supported: use ddp")
    if (config.get("fp16") or {}).get("enabled"):
        raise ConfigurationError(
            "trainer.precision=16-mixed with deepspeed would skip updates silently: use bf16-mixed or 32-true"
        )
    if (config.get("torch_autocast") or {}).get("enabled"):
        raise ConfigurationError("DeepSpeed's torch_autocast is not supported: use trainer.precision=bf16-mixed")
    if "optimizer" in config:
        raise ConfigurationError("DeepSpeed's configuration has an optimizer: give it as model.optimizer instead")
    if max_norm is None:
        return
    clipping = config.get("gradient_clipping") or max_norm
    if clipping != max_norm:
        raise ConfigurationError(
            f"DeepSpeed's configuration has gradient_clipping={clipping}, but model.update.max_grad_norm is "
            f"{max_norm}: leave gradient_clipping out"
        )
    config["gradient_clipping"] = max_norm


@contextmanager
def outside_init() -> Iterator[None]:
    """Leave ``zero.Init``: within, models are made as ever."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def to_computing_precision(model: nn.Module, config: dict[str, Any]) -> None:
    """Convert a model's parameters, not its buffers, as DeepSpeed does with those it trains."""
    if (config.get("bf16") or {}).get("enabled"):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


def partition(model: nn.Module, config: dict[str, Any], device: torch.device, remote_device: str | None) -> None:
    """Partition a model in place over all ranks, one parameter at a time (ZeRO-3).

    Args:
        model: The model, on the CPU.
        config: DeepSpeed's configuration.
        device: Where gathered parameters, and buffers, are.
        remote_device: Where partitions are, if elsewhere.

    Raises:
        ConfigurationError: Its weights are quantised, which cannot be partitioned.
    """
    import deepspeed

    if any(is_quantised(parameter) for parameter in model.parameters()):
        raise ConfigurationError("model.adapter.quantization does not go with ZeRO-3: use deepspeed_stage_2 or ddp")
    with outside_init():
        deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=remote_device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)


@contextmanager
def whole_partitions(model: nn.Module) -> Iterator[None]:
    """Keep all parameters gathered: within, forward passes are no collectives. All ranks must enter and leave.

    DeepSpeed's hooks, which would let parameters go after every layer, are off meanwhile.
    """
    import deepspeed

    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = type(before)(), type(after)()
        try:
            yield
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after


def is_partitioned(model: nn.Module) -> bool:
    """Whether a model's parameters are partitioned by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


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


class DeepSpeedPlacement(Placement):
    """ZeRO.

    Args:
        trainer: Lightning's trainer, with a ``DeepSpeedStrategy``.
    """

    def __init__(self, trainer: Any) -> None:
        self.strategy = trainer.strategy
        update = getattr(trainer.lightning_module, "update", None)
        prepare_settings(self.strategy.config, None if update is None else update.max_grad_norm)

    def loading(self) -> AbstractContextManager[Any]:
        """As without DeepSpeed: on the CPU if the policy is to be partitioned."""
        return outside_init()

    def place(self, model: Any) -> None:
        """Partition under ZeRO-3; a reference, of which nothing trains, stays whole."""
        strategy = self.strategy
        to_computing_precision(model, strategy.config)
        if zero_stage(strategy.config) == 3 and any(p.requires_grad for p in model.parameters()):
            partition(model, strategy.config, strategy.root_device, strategy.remote_device)
