"""A policy's weights as a stream of (name, tensor), whatever the policy is wrapped in.

One parameter at a time is gathered (FSDP2, ZeRO-3) or merged (LoRA and other PEFT adapters), so that
there is never a second full copy. The policy itself is left bit for bit as it was: an adapter is
merged into its layer, the merged weight copied, and the layer's own weight put back from a copy,
because subtracting the adapter again would leave rounding behind.

Quantised weights are given in the precision that they are computed in. Buffers that checkpoints hold (biases of
routers, scales of layers) are weights too.

Tied parameters appear under each of their names: vLLM 0.32 on a CPU otherwise keeps an old output head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights as a checkpoint of this architecture names and divides them, which is what engines load.

    transformers computes with experts in one tensor, for one, which checkpoints hold one by one. With sharded
    parameters this is a collective: every rank has to exhaust it.
    """
    model = underlying_model(policy)
    for _, weights in groupby(named_weights(policy), key=lambda weight: _layer_of(weight[0])):
        yield from revert_weight_conversion(model, dict(weights)).items()


def named_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights that the policy computes with, under the names that its architecture gives them.

    With sharded parameters this is a collective: every rank has to exhaust it.
    """
    model = underlying_model(policy)
    adapters = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    saved = model.state_dict().keys()
    buffers = (named for named in model.named_buffers(remove_duplicate=False) if named[0] in saved)
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), buffers):
        layer_name, adapted, inner = name.rpartition(".base_layer.")
        if adapted:
            is_merged = isinstance(tensor, nn.Parameter)
            yield f"{layer_name}.{inner}", _merged(adapters[layer_name], inner) if is_merged else gathered(tensor)
        elif _is_within(name, adapters):
            continue  # the adapter's own parameters
        elif ".original_module." not in name:
            yield (
                _saved_module_name(name),
                _dequantised(_owner(model, name)) if is_quantised(tensor) else gathered(tensor),
            )


def underlying_model(policy: Any) -> Any:
    """The transformers model within a PEFT model, or the model itself."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def save_architecture(policy: nn.Module, folder: Path) -> str:
    """Write the policy's configuration, all that an engine without weights of its own needs."""
    plain_configuration(policy).save_pretrained(folder)
    return str(folder)


def plain_configuration(policy: nn.Module) -> Any:
    """Configuration of the policy with whole, merged weights that are not quantised."""
    model: Any = underlying_model(policy)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    config.architectures = config.architectures or [plain_class(model).__name__]
    return config


def plain_class(model: nn.Module) -> Any:
    """A model's architecture: sharding gives it a class of its own."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def gathered(parameter: Any) -> Tensor:
    """The whole of a parameter that may be sharded over ranks."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        with _zero3_gathered([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _merged(layer: Any, inner: str) -> Tensor:
    """One of the layer's own parameters with the active adapters merged in."""
    if inner == "weight" and is_quantised(layer.base_layer.weight):
        return _merged_quantised(layer)
    parameters = list(layer.parameters())
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    with _zero3_gathered(sharded) if sharded else nullcontext(), torch.no_grad():
        own = dict(layer.base_layer.named_parameters())
        saved = {name: parameter.detach().clone() for name, parameter in own.items()}
        layer.merge()
        merged = (own[inner].detach() if sharded else gathered(own[inner])).clone()
        layer.unmerge()
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return merged


def _merged_quantised(layer: Any) -> Tensor:
    """PEFT would quantise the merged weight again, and round the adapter away."""
    weight = _dequantised(layer.base_layer)
    with torch.no_grad():
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
        return sum((delta.to(weight) for delta in deltas), weight)


def is_quantised(parameter: Any) -> bool:
    """Whether a parameter is one of bitsandbytes'."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def _dequantised(layer: Any) -> Tensor:
    """The weight of one of bitsandbytes' layers, which is left alone: PEFT's function breaks 8-bit ones on a CPU."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return dequantize_4bit(weight.data, weight.quant_state).detach()
    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB  # the first forward pass moves them
    return int8_vectorwise_dequant(weight.data, scales).detach()


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "merge") and hasattr(module, "unmerge")


def _is_within(name: str, adapters: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in adapters for i in range(1, len(parts)))


def _layer_of(name: str) -> tuple[str, ...]:
    """The beginning of a name up to the number of its layer; weights of a layer come one after another."""
    parts = name.split(".")
    return tuple(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)])


def _saved_module_name(name: str) -> str:
    """``x.modules_to_save.<adapter>.weight`` is the trained copy of ``x.weight``."""
    module, saved, inner = name.partition(".modules_to_save.")
    return f"{module}.{inner.partition('.')[2]}" if saved else name


def _zero3_gathered(parameters: list[Tensor]) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
