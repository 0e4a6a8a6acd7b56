"""DeepSpeed's ZeRO: checks its settings, partitions a policy, and gathers it for a while.

Under ZeRO-3 a policy is loaded whole on the CPU, inspected and copied as without DeepSpeed, and then partitioned
parameter by parameter. Lightning configures models inside ``zero.Init``; this module leaves it for that time. A node
needs CPU memory for as many whole policies as it has processes. A GPU never holds a whole one. Under ZeRO-1 and 2 the
policy is loaded on the GPU, where it stays whole. A reference policy stays whole on every rank, in the precision that
DeepSpeed computes in.

Checkpoints are DeepSpeed's folders. DeepSpeed resumes them on as many ranks as wrote them and refuses other numbers.
To continue on another number of ranks, start from the exported policy. With an offloaded optimizer DeepSpeed demands
``model.optimizer: deepspeed.ops.adam.DeepSpeedCPUAdam``.

Lightning lets DeepSpeed run on CUDA only. The tests replace that check and run ZeRO-2 and ZeRO-3 with two processes on
the CPU. Untested are CUDA, ZeRO-1, offloading and NVMe.
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
    """Makes Lightning call a module's steps directly, not within the engine's forward pass.

    A step of this module contains a rollout and any number of forward passes. The engine's forward pass is for one
    micro-batch. Around a whole step it would gather the first layers for a pass that does not come.
    """

    def __call__(self, wrapper_module: Any, original_module: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the module's method."""
        return getattr(original_module, method_name)(*args, **kwargs)


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 if ZeRO is off."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def prepare_settings(config: dict[str, Any], max_norm: float | None) -> None:
    """Check a DeepSpeed configuration and set its gradient clipping to the module's limit.

    Args:
        config: The configuration; changed in place.
        max_norm: ``model.update.max_grad_norm``; ``None`` for a module that does not train.

    Raises:
        ConfigurationError: The module's update cannot work with a setting.
    """
    if zero_stage(config) == 0:
        raise ConfigurationError("trainer.strategy deepspeed with ZeRO off (stage 0) is not supported: use ddp")
    if (config.get("fp16") or {}).get("enabled"):
        raise ConfigurationError(
            "trainer.precision=16-mixed: DeepSpeed skips updates silently in fp16: use bf16-mixed or 32-true"
        )
    if (config.get("torch_autocast") or {}).get("enabled"):
        raise ConfigurationError("DeepSpeed's torch_autocast is not supported: use trainer.precision=bf16-mixed")
    if "optimizer" in config:
        raise ConfigurationError("DeepSpeed's configuration has an optimizer: remove it and set model.optimizer")
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
    """Leave ``zero.Init`` for a while: models made in this context are not partitioned."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def to_computing_precision(model: nn.Module, config: dict[str, Any]) -> None:
    """Convert a model's parameters to bf16 if DeepSpeed computes in it; buffers stay, as in models that it trains."""
    if (config.get("bf16") or {}).get("enabled"):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


def partition(model: nn.Module, config: dict[str, Any], device: torch.device, remote_device: str | None) -> None:
    """Partition a model in place over all ranks, one parameter at a time (ZeRO-3).

    Args:
        model: The model, on the CPU.
        config: DeepSpeed's configuration.
        device: Where gathered parameters and buffers are.
        remote_device: Where partitions are; ``device`` if not given.

    Raises:
        ConfigurationError: The model's weights are quantised; these cannot be partitioned.
    """
    import deepspeed

    if any(is_quantised(parameter) for parameter in model.parameters()):
        raise ConfigurationError("model.adapter.quantization is not possible with ZeRO-3: use deepspeed_stage_2 or ddp")
    with outside_init():
        deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=remote_device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)


@contextmanager
def whole_partitions(model: nn.Module) -> Iterator[None]:
    """Keep all parameters gathered: ranks may run different numbers of forward passes. All must enter and leave.

    DeepSpeed's hooks are off in this context, because they release parameters after every layer.
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
    """Whether ZeRO-3 has partitioned a model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class DeepSpeedAccumulation(GradientAccumulation):
    """ZeRO: DeepSpeed's engine reduces, clips and steps.

    A rank holds only its partition of the gradients. The engine therefore reduces those of every pass (ZeRO-1: of the
    last pass).

    The engine counts passes by calls of its ``forward``. Without a call for every pass, ZeRO-3 would overwrite the
    gradients of the pass before. This is why ``forward`` runs the loss inside the engine.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.engine = module.trainer.strategy.deepspeed_engine
        self.engine.basic_optimizer.register_step_pre_hook(self._before_step)
        self._is_usable = True

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Call ``compute``, which returns the loss of a micro-batch, within the engine's forward pass."""
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

    def step(self, optimizer: Any, max_norm: float, is_usable: bool = True) -> float:
        """Let the engine clip and make the step, unless the gradient is not usable or not finite.

        The engine is called in any case: it lets go of the gradients that it holds.

        Args:
            optimizer: The optimizer that DeepSpeed wraps.
            max_norm: Not used: ``prepare_settings`` gives it to the engine.
            is_usable: Whether to make the step at all; the same on all ranks.

        Returns:
            The norm before clipping, the same on all ranks.
        """
        self._is_usable = is_usable
        optimizer.step()
        norm = self._norm() if self.engine.was_step_applied() else math.nan
        if not (is_usable and math.isfinite(norm)):
            self._uncount()
        return norm

    def _norm(self) -> float:
        """The norm that the engine has computed. One that is not finite it knows as -1."""
        norm = float(self.engine.optimizer._global_grad_norm)
        return math.nan if norm < 0 else norm

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """Take the gradient from the optimizer, which leaves a parameter without one as it is, and its state too."""
        if not (self._is_usable and math.isfinite(self._norm())):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _uncount(self) -> None:
        """Take back that Lightning has counted an update."""
        progress = self.module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for counts in (progress.total, progress.current):
            counts.ready -= 1
            counts.completed -= 1


class DeepSpeedPlacement(Placement):
    """ZeRO: partitions under stage 3; the policy is whole on every rank below.

    Args:
        trainer: Lightning's trainer, with a ``DeepSpeedStrategy``.
    """

    holds_contexts = False

    def __init__(self, trainer: Any) -> None:
        self.strategy = trainer.strategy
        update = getattr(trainer.lightning_module, "update", None)
        prepare_settings(self.strategy.config, None if update is None else update.max_grad_norm)

    def loading(self) -> AbstractContextManager[Any]:
        """A context outside ``zero.Init``, in which models are made whole."""
        return outside_init()

    def place(self, model: Any) -> None:
        """Convert to the computing precision, and partition under ZeRO-3; a reference stays whole.

        Raises:
            ConfigurationError: The model's weights are quantised and would be partitioned.
        """
        strategy = self.strategy
        to_computing_precision(model, strategy.config)
        if zero_stage(strategy.config) == 3 and any(p.requires_grad for p in model.parameters()):
            partition(model, strategy.config, strategy.root_device, strategy.remote_device)
