"""An adapter's own weights as a stream of (name, tensor), for engines that add it to the base while they compute.

The stream has the names of PEFT's files: ``base_model.model.LAYER.lora_A.weight`` and ``….lora_B.weight``. B is scaled,
so the adapter's output is B A x, whatever its ranks and scales are. Sharded parameters are gathered one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rpo_lightning.policy.lora import has_adapter
from rpo_lightning.policy.weights import adapted_layers, gathered, underlying_model

NO_ADAPTER = "the policy has no adapter: set model.adapter=LoRA"


def adapter_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stream A (rank × inputs) and B (outputs × rank) of every adapted layer.

    ``adapter_problem`` must have found nothing. With sharded parameters every rank must exhaust the stream.
    """
    for name, layer, adapter in _pairs(policy):
        prefix = f"base_model.model.{name}"
        yield f"{prefix}.lora_A.weight", gathered(layer.lora_A[adapter].weight)
        yield f"{prefix}.lora_B.weight", gathered(layer.lora_B[adapter].weight) * layer.scaling[adapter]


def adapter_shape(policy: nn.Module) -> tuple[int, list[str]]:
    """The adapter's largest rank, and the names of the adapted layers."""
    pairs = list(_pairs(policy))
    return max(layer.r[adapter] for _, layer, adapter in pairs), [name for name, _, _ in pairs]


def adapter_problem(policy: nn.Module) -> str | None:
    """Why the policy is not just its base and a pair of matrices for each adapted linear layer.

    Returns:
        What is wrong and what to change, or ``None``.
    """
    if not has_adapter(policy):
        return NO_ADAPTER
    from peft.tuners.lora import LoraLayer

    for name, layer in adapted_layers(policy).items():
        base, active = layer.get_base_layer(), layer.active_adapters
        if not isinstance(layer, LoraLayer) or not isinstance(base, nn.Linear):
            return f"{name} is no linear layer with LoRA ({type(layer).__name__}): leave it out of model.adapter"
        if len(active) != 1:
            return f"{name} has {len(active)} active adapters ({', '.join(active)}): activate one"
        variant = layer.lora_variant.get(active[0])
        if variant is not None:
            return (
                f"{name} has {type(variant).__name__.removesuffix('LinearVariant')}, which is more than a pair of "
                "matrices: remove it from model.adapter.options"
            )
    pairs = {id(p) for _, layer, adapter in _pairs(policy) for p in _matrices(layer, adapter)}
    others = [name for name, p in underlying_model(policy).named_parameters() if p.requires_grad and id(p) not in pairs]
    if others:
        return (
            f"{others[0]} trains besides the adapter's matrices: remove what trains it from model.adapter.options "
            "(modules_to_save, bias, lora_bias or trainable_token_indices)"
        )
    return None


def _pairs(policy: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """The name of each adapted layer, the layer, and the name of its active adapter."""
    for name, layer in adapted_layers(policy).items():
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                yield name, layer, adapter


def _matrices(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
