"""The settings that decide how much memory a run needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rpo_lightning.cli.memory.optimizers import ADAMW, OptimizerState


class Precision(StrEnum):
    """The precision of parameters and of computation.

    ``FULL``: parameters and computation in fp32. ``MIXED``: parameters in fp32, computation in 16 bits. ``HALF``: both
    in 16 bits. ``DOUBLE``: both in fp64.
    """

    FULL = "32-true"
    MIXED = "16-bit mixed"
    HALF = "16-bit true"
    DOUBLE = "64-true"

    @property
    def held(self) -> int:
        """Bytes of a number of a parameter."""
        return {Precision.FULL: 4, Precision.MIXED: 4, Precision.HALF: 2, Precision.DOUBLE: 8}[self]

    @property
    def computed(self) -> int:
        """Bytes of a number in matrix products."""
        return {Precision.FULL: 4, Precision.MIXED: 2, Precision.HALF: 2, Precision.DOUBLE: 8}[self]


class Sharding(StrEnum):
    """How a policy is distributed over ranks."""

    SINGLE = "one device"
    DDP = "DDP"
    FSDP2 = "FSDP2"
    ZERO1 = "DeepSpeed ZeRO-1"
    ZERO2 = "DeepSpeed ZeRO-2"
    ZERO3 = "DeepSpeed ZeRO-3"

    @property
    def is_zero(self) -> bool:
        """Whether it is a stage of DeepSpeed ZeRO."""
        return self.name.startswith("ZERO")


@dataclass(frozen=True)
class EnginePlan:
    """The settings of the rollout engine.

    Attributes:
        is_vllm: Whether it is vLLM; otherwise it is the transformers engine.
        gpu_share: Share of the GPU's memory that vLLM takes.
        sleep_level: What vLLM frees in the update: 0 nothing, 1 and 2 weights and key-value cache.
        tensor_parallel: Ranks that share vLLM's weights.
        bytes_per_number: Bytes of a number of vLLM's weights; the trainer's if not given.
        sequences: Sequences that the transformers engine decodes at once.
    """

    is_vllm: bool = False
    gpu_share: float = 0.5
    sleep_level: int = 2
    tensor_parallel: int = 1
    bytes_per_number: int | None = None
    sequences: int = 128


@dataclass(frozen=True)
class Plan:
    """All settings that decide memory, except the model.

    Attributes:
        devices: Devices of one node.
        nodes: Nodes.
        on_gpu: Whether the devices are GPUs.
        precision: The precision of parameters and of computation.
        sharding: How the policy is distributed over ranks.
        optimizer: States of the optimizer.
        micro_batch_tokens: Tokens of one forward and backward pass, padding included.
        prompt_tokens: Tokens of the longest prompt.
        response_tokens: Tokens of the longest response.
        group_size: Responses to a question.
        shares_prefixes: Whether members of a group share rows.
        has_cache: Whether prefixes come from an experience cache.
        temperature: Sampling temperature.
        checkpointing: Whether activations are computed again in the backward pass.
        accumulate_sharded: With FSDP2, whether gradients are reduced after every micro-batch.
        bucket_view: With DDP, whether gradients are views of its buckets.
        offloads_optimizer: Whether DeepSpeed holds master weights and optimizer states in CPU memory.
        offloads_parameters: Whether ZeRO-3 holds parameters in CPU memory.
        bucket_elements: DeepSpeed's ``reduce_bucket_size``.
        overlaps: Whether DeepSpeed reduces while it computes, which needs a second bucket.
        has_reference: Whether the objective needs a reference policy.
        engine: The settings of the rollout engine.
    """

    devices: int = 1
    nodes: int = 1
    on_gpu: bool = True
    precision: Precision = Precision.FULL
    sharding: Sharding = Sharding.SINGLE
    optimizer: OptimizerState = ADAMW
    micro_batch_tokens: int = 16384
    prompt_tokens: int = 1024
    response_tokens: int = 4096
    group_size: int = 6
    shares_prefixes: bool = True
    has_cache: bool = True
    temperature: float = 1.0
    checkpointing: bool = False
    accumulate_sharded: bool = False
    bucket_view: bool = False
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    bucket_elements: int = 200_000_000
    overlaps: bool = True
    has_reference: bool = False
    engine: EnginePlan = field(default_factory=EnginePlan)

    @property
    def ranks(self) -> int:
        """Number of processes that train, one for each device."""
        return self.devices * self.nodes

    @property
    def longest(self) -> int:
        """Tokens of the longest plain row: prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch.

        A row above the limit makes a micro-batch of its own (``policy/prefix_sharing/rows.py``).
        """
        return max(self.micro_batch_tokens, self.longest)

    @property
    def casts_weights(self) -> bool:
        """Whether autocast casts weights at every use. FSDP2 and DeepSpeed provide them in 16 bits instead."""
        return self.precision is Precision.MIXED and self.sharding in (Sharding.SINGLE, Sharding.DDP)


@dataclass(frozen=True)
class Part:
    """A part of a device's memory, in bytes, by moment.

    Attributes:
        name: Name in the table.
        rollout: Bytes while responses are generated.
        backward: Bytes between the forward and the backward pass of the largest micro-batch.
        step: Bytes in the optimizer's step.
    """

    name: str
    rollout: float = 0.0
    backward: float = 0.0
    step: float = 0.0

    @classmethod
    def always(cls, name: str, size: float) -> Part:
        """A part of the same size at all moments."""
        return cls(name, size, size, size)
