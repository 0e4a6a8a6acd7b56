"""FSDP2: a policy in shards over all ranks, and whole again for a while.

Every decoder layer is a unit that is gathered when it is computed and let go afterwards; embeddings and output
head, which may be tied, form one more with what is left. A policy is loaded on the CPU and sharded layer by layer, so
that no device ever holds more than a layer of it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rpo_lightning.errors import ConfigurationError
from rpo_lightning.zero import is_partitioned, whole_partitions


def require_data_parallel(strategy: ModelParallelStrategy) -> Any:
    """The mesh of a strategy in which every rank is a data-parallel one.

    Raises:
        ConfigurationError: It has tensor-parallel ranks, which is Lightning's default.
    """
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            f"trainer.strategy ModelParallelStrategy would split {mesh['tensor_parallel'].size()} ranks by tensors, "
            f"which the policy does not do: set its init_args to data_parallel_size: {mesh.size()} and "
            "tensor_parallel_size: 1"
        )
    return mesh["data_parallel"]


def shard(model: Any, mesh: Any, precision: str) -> None:
    """Shard a model in place.

    Args:
        model: A transformers or PEFT model, on the CPU.
        mesh: The ranks to shard over.
        precision: Lightning's; with ``bf16-mixed`` parameters travel and compute in bf16, and gradients are
            reduced in fp32.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers that a model says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Keep all parameters gathered: within, forward passes are no collectives. All ranks must enter and leave."""
    if is_partitioned(model):
        with whole_partitions(model):
            yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    resharding = [unit for unit in units if unit is not model]
    for unit in units:
        unit.unshard()
    for unit in resharding:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in resharding:
            unit.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()
