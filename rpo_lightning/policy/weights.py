"""A policy's weights as a stream of (name, tensor), for engines and exports.

The policy may be sharded (FSDP2, ZeRO-3), quantised, or wrapped by PEFT. One parameter at a time is gathered or
merged: there is never a second full copy. The policy itself does not change by a bit. An adapter is merged into its
layer, the merged weight is copied, and the layer's own weight is restored from a copy. Subtracting the adapter
instead would leave rounding errors.

* Quantised weights come in the precision that they are computed in.
* Buffers that checkpoints hold (biases of routers, scales of layers) are weights too.
* Tied parameters appear under each of their names: vLLM 0.32 on a CPU keeps an old output head otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from rpo_lightning.core.errors import ConfigurationError


def checkpoint_weights(policy: nn.Module, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights under the names and in the shapes of a checkpoint of this architecture; engines load these.

    They may differ from those in memory: transformers computes with all experts of a layer in one tensor, checkpoints
    hold them one by one. With sharded parameters every rank must exhaust the stream.

    Args:
        policy: The policy.
        merged: Whether adapters are merged into the weights; if not, they are left out.
    """
    model = underlying_model(policy)
    for _, weights in groupby(named_weights(policy, merged), key=lambda weight: _layer_of(weight[0])):
        yield from revert_weight_conversion(model, dict(weights)).items()


def named_weights(policy: nn.Module, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights that the policy computes with, under the names of its architecture.

    With sharded parameters every rank must exhaust the stream.

    Args:
        policy: The policy.
        merged: Whether adapters are merged into the weights; if not, they are left out.
    """
    return ((name, weight()) for name, weight in _weights(policy, merged))


def policy_fingerprint(policy: nn.Module) -> str:
    """Identifies a policy by a thousand values of each of its weights; with sharded parameters a collective."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in named_weights(policy):
        values = weight.detach().reshape(-1)
        digest.update(name.encode())
        digest.update(values[:: max(1, len(values) // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def require_plain_names(policy: nn.Module) -> None:
    """Check that the stream has exactly the names of the architecture. Call this before training and before writing.

    An adapter may wrap a layer in a way that this module does not know. Its weights then have names that no checkpoint
    has. An export would lose them, and loading it would replace them by random ones.

    Raises:
        ConfigurationError: A name is missing or unknown.
    """
    expected = set(empty_model(policy).state_dict())
    streamed = {name for name, _ in _weights(policy)}
    missing, unknown = sorted(expected - streamed), sorted(streamed - expected)
    if missing or unknown:
        raise ConfigurationError(
            f"model.adapter: the names of the weights are not those of "
            f"{plain_class(underlying_model(policy)).__name__}: missing {', '.join(missing[:3]) or 'none'}; unknown "
            f"{', '.join(unknown[:3]) or 'none'}: remove the adapter's option that wraps these layers"
        )


def adapted_layers(policy: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, under the names of the architecture."""
    return {name: module for name, module in underlying_model(policy).named_modules() if _is_adapted(module)}


def _weights(policy: nn.Module, merged: bool = True) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the name of each weight, and a function that computes it."""
    model = underlying_model(policy)
    adapters = adapted_layers(policy)
    saved = model.state_dict().keys()
    buffers = (named for named in model.named_buffers(remove_duplicate=False) if named[0] in saved)
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), buffers):
        layer_name, adapted, inner = name.rpartition(".base_layer.")
        own = partial(_dequantised, _owner(model, name)) if is_quantised(tensor) else partial(gathered, tensor)
        if adapted:
            is_merged = merged and isinstance(tensor, nn.Parameter)
            weight = partial(_merged, adapters[layer_name], inner) if is_merged else own
            # PEFT puts adapters of single tokens (trainable_token_indices) into a child of the embedding.
            yield f"{layer_name.removesuffix('.token_adapter')}.{inner}", weight
        elif _is_within(name, adapters):
            continue  # the adapter's own parameters
        elif ".original_module." not in name:
            yield _saved_module_name(name), own


def underlying_model(policy: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def save_architecture(policy: nn.Module, folder: Path) -> str:
    """Write the policy's configuration for an engine that gets its weights later; return the folder's name."""
    plain_configuration(policy).save_pretrained(folder)
    return str(folder)


def plain_configuration(policy: nn.Module) -> Any:
    """The policy's configuration, as it is for whole, merged weights without quantisation."""
    model: Any = underlying_model(policy)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    config.architectures = config.architectures or [plain_class(model).__name__]
    return config


def empty_model(policy: Any) -> Any:
    """The policy's architecture without weights; a sharded or quantised model cannot save itself as a plain one."""
    own: Any = underlying_model(policy)
    with torch.device("meta"):
        model = plain_class(own)._from_config(plain_configuration(policy))
    model.generation_config = own.generation_config
    return model


def plain_class(model: nn.Module) -> Any:
    """The class of a model's architecture. FSDP2 gives a model a class of its own, which is skipped."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def gathered(parameter: Any) -> Tensor:
    """A whole parameter, detached. If it is sharded, all ranks must call this."""
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
    """Merge by hand: PEFT quantises the merged weight again, which rounds the adapter away."""
    weight = _dequantised(layer.base_layer)
    with torch.no_grad():
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
        return sum((delta.to(weight) for delta in deltas), weight)


def is_quantised(parameter: Any) -> bool:
    """Whether a parameter is quantised by bitsandbytes."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def _dequantised(layer: Any) -> Tensor:
    """The weight of a bitsandbytes layer. The layer is not changed: PEFT's function breaks 8-bit layers on a CPU."""
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
    """The parts of a name up to the number of its layer. Weights of one layer follow one another."""
    parts = name.split(".")
    return tuple(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)])


def _saved_module_name(name: str) -> str:
    """``x.modules_to_save.<adapter>.weight`` is the trained copy of ``x.weight``."""
    module, saved, inner = name.partition(".modules_to_save.")
    return f"{module}.{inner.partition('.')[2]}" if saved else name


def _zero3_gathered(parameters: list[Tensor]) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
