"""FSDP2: shards a policy over all ranks, and gathers it for a while.

Every decoder layer is a unit. It is gathered when it is computed and released afterwards. All other parameters form
one more unit; embeddings and output head are in it, and may be tied. A policy is loaded on the CPU and sharded layer by
layer: no device holds more than one whole layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.parallel.base import GradientAccumulation, Placement
from rpo_lightning.policy.weights import is_quantised


def require_data_parallel(strategy: ModelParallelStrategy) -> Any:
    """The data-parallel mesh of a strategy.

    Raises:
        ConfigurationError: The strategy has tensor-parallel ranks, as Lightning's default does.
    """
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            f"trainer.strategy=ModelParallelStrategy has tensor_parallel_size={mesh['tensor_parallel'].size()}, but a "
            f"policy cannot be split by tensors: set its init_args to data_parallel_size: {mesh.size()} and "
            "tensor_parallel_size: 1"
        )
    return mesh["data_parallel"]


def shard(model: Any, mesh: Any, precision: str) -> None:
    """Shard a model in place.

    Args:
        model: A transformers or PEFT model, on the CPU.
        mesh: The ranks to shard over.
        precision: ``trainer.precision``. With ``bf16-mixed`` parameters travel and compute in bf16, and gradients
            are reduced in fp32.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers that a model declares as units (``_no_split_modules``)."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@contextmanager
def whole_shards(model: nn.Module) -> Iterator[None]:
    """Keep all parameters gathered: ranks may run different numbers of forward passes. All must enter and leave."""
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


class ShardedAccumulation(GradientAccumulation):
    """FSDP2: every rank has a shard of each parameter.

    Gradients stay whole on every rank until the last pass. With ``model.update.accumulate_sharded`` every pass reduces
    its own: more traffic, once a pass, and only the memory of a shard.
    """

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        self.module.policy.set_requires_gradient_sync(is_last or self.module.update.accumulate_sharded)
        self.module.policy.set_is_last_backward(is_last)
        return nullcontext()


class ShardedPlacement(Placement):
    """FSDP2: every decoder layer is sharded over all ranks.

    Args:
        trainer: Lightning's trainer, with a ``ModelParallelStrategy``.
    """

    holds_contexts = False

    def __init__(self, trainer: Any) -> None:
        self.mesh = require_data_parallel(trainer.strategy)
        self.precision = str(trainer.precision)

    def loading(self) -> AbstractContextManager[Any]:
        """A context in which models are made on the CPU."""
        return torch.device("cpu")

    def place(self, model: Any) -> None:
        """Shard layer by layer.

        Raises:
            ConfigurationError: The model's weights are quantised.
        """
        if any(is_quantised(parameter) for parameter in model.parameters()):
            raise ConfigurationError(
                "model.adapter.quantization is not possible with ModelParallelStrategy, which cannot split quantised "
                "weights: use trainer.strategy=ddp, or leave model.adapter.quantization out"
            )
        shard(model, self.mesh, self.precision)
