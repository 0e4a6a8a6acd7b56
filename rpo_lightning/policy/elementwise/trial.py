"""Compares a decoder layer that has fused kernels with the same layer without them, on a few tokens.

Compared are the layer's output and the gradients of its input and of every parameter:

* in fp32, where both must agree up to rounding;
* under bf16 autocast, where the fused layer must be about as close to the fp32 result as the plain layer is.

A whole layer is tried, not a kernel: some kernels write into their inputs, which is right only if nothing else reads
them. A copy of the layer is moved to the device, so it does not matter where the policy is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpo_lightning.policy.parallel.fsdp2 import decoder_layers

# Largest relative difference (Frobenius norm) in fp32. Products in TF32 may round the other way now and then.
_AGREEMENT = 1e-3
_COARSE = torch.bfloat16
# In bf16 the fused layer may be this many times as far from fp32 as the plain layer. Rounding alone is about 1.
_ROUNDINGS = 2.0
# Where a gradient has few elements, the plain layer may be closer by chance. The fused one need not be as close.
_ONE_ROUNDING = torch.finfo(_COARSE).eps / 2
_TOKENS = 8


class _ReachedError(Exception):
    """The first decoder layer was called."""


def failure_of_kernels(model: Any, changed: list[nn.Module], device: torch.device) -> str | None:
    """Where fused kernels compute something else than the plain layers; ``None`` if they agree.

    Args:
        model: The model with the kernels, whole, on any device.
        changed: The modules that have them.
        device: Where the model will compute.
    """
    layers = decoder_layers(model)
    if not layers:
        return "it does not say what its decoder layers are"
    arguments = _arguments_of_first_layer(model, layers[0])
    fused = set(changed)
    kinds = {tuple((name, type(m)) for name, m in layer.named_modules() if m in fused): layer for layer in layers}
    for layer in kinds.values():
        failure = _failure_of_layer(layer, arguments, device)
        if failure is not None:
            return failure
    return None


def _arguments_of_first_layer(model: Any, layer: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model calls its first decoder layer with. Nothing after the embedding is computed."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((args, options))
        raise _ReachedError

    size, where = model.config.get_text_config().vocab_size, next(model.parameters()).device
    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), where:
            model(input_ids=torch.arange(3, 3 + _TOKENS, device=where)[None] % size, use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def _failure_of_layer(layer: nn.Module, arguments: Any, device: torch.device) -> str | None:
    layer = copy.deepcopy(layer).to(device).float().eval()
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    args, options = _moved(arguments, device)
    fused_exact, fused_coarse = _computed(layer, args, options)
    with _plain(layer):
        exact, coarse = _computed(layer, args, options)
    for name, expected in exact.items():
        size = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
        apart = float((fused_exact[name] - expected).norm() / size)
        rounding, fused_rounding = (float((c[name] - expected).norm() / size) for c in (coarse, fused_coarse))
        if not apart <= _AGREEMENT:
            return f"{name} differs by {apart:.2g} (relative) in fp32"
        if not fused_rounding <= _ROUNDINGS * max(rounding, _ONE_ROUNDING):
            return f"{name} is {fused_rounding:.2g} (relative) off in bf16, and {rounding:.2g} without the kernels"
    return None


def _computed(layer: nn.Module, args: Any, options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of a layer in fp32 and under bf16 autocast, by name."""
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = []
    for coarse in (False, True):
        hidden = args[0].detach().float().requires_grad_()
        device = hidden.device.type
        with torch.enable_grad(), torch.autocast(device, dtype=_COARSE, enabled=coarse):
            output = layer(hidden, *args[1:], **options)
        output = output[0] if isinstance(output, tuple) else output
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float32, device=output.device).cos().view_as(output)
        gradients = torch.autograd.grad((output.float() * weights).sum(), [hidden, *parameters.values()])
        names = ("its output", "the gradient of its input", *(f"the gradient of {name}" for name in parameters))
        results.append({name: t.detach().float() for name, t in zip(names, (output, *gradients), strict=True)})
    return results[0], results[1]


@contextmanager
def _plain(layer: nn.Module) -> Iterator[None]:
    """The layer with the methods of its classes."""
    fused = {module: module.__dict__.pop("forward") for module in layer.modules() if "forward" in module.__dict__}
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.__dict__["forward"] = forward


def _moved(value: Any, device: torch.device) -> Any:
    """Arguments with their tensors on a device, those of real numbers in fp32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _moved(v, device) for key, v in value.items()}
    return value
