"""The settings that decide how much memory a run needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rpo_lightning.cli.memory.optimizers import ADAMW, OptimizerState


class Precision(StrEnum):
    """What parameters are held in, and what is computed in.

    ``FULL`` holds and computes in fp32. ``MIXED`` holds fp32 and computes in 16 bits. ``HALF`` holds and computes
    in 16 bits. ``DOUBLE`` is fp64.
    """

    FULL = "32-true"
    MIXED = "16-bit mixed"
    HALF = "16-bit true"
    DOUBLE = "64-true"

    @property
    def held(self) -> int:
        """Bytes of a parameter."""
        return {Precision.FULL: 4, Precision.MIXED: 4, Precision.HALF: 2, Precision.DOUBLE: 8}[self]

    @property
    def computed(self) -> int:
        """Bytes of a number that matrix products take."""
        return {Precision.FULL: 4, Precision.MIXED: 2, Precision.HALF: 2, Precision.DOUBLE: 8}[self]


class Sharding(StrEnum):
    """How a policy is laid over ranks."""

    SINGLE = "one device"
    DDP = "DDP"
    FSDP2 = "FSDP2"
    ZERO1 = "DeepSpeed ZeRO-1"
    ZERO2 = "DeepSpeed ZeRO-2"
    ZERO3 = "DeepSpeed ZeRO-3"

    @property
    def is_zero(self) -> bool:
        """Whether it is DeepSpeed's."""
        return self.name.startswith("ZERO")


@dataclass(frozen=True)
class EnginePlan:
    """The rollout engine.

    Attributes:
        is_vllm: vLLM, or else the transformers engine.
        gpu_share: Share of the GPU's memory that vLLM takes.
        sleep_level: What vLLM gives back: 0 nothing, 1 and 2 weights and key–value cache.
        tensor_parallel: Ranks that share vLLM's weights.
        bytes_per_number: Of vLLM's weights; what the trainer computes in if not given.
        sequences: Sequences that the transformers engine decodes at once.
    """

    is_vllm: bool = False
    gpu_share: float = 0.5
    sleep_level: int = 1
    tensor_parallel: int = 1
    bytes_per_number: int | None = None
    sequences: int = 128


@dataclass(frozen=True)
class Plan:
    """Everything but the model.

    Attributes:
        devices: Devices of one node.
        nodes: Nodes.
        on_gpu: Whether the devices are GPUs.
        precision: What parameters are held and computed in.
        sharding: How the policy is laid over ranks.
        optimizer: States of the optimizer.
        micro_batch_tokens: Tokens of one forward and backward pass, padding included.
        prompt_tokens: Longest prompt.
        response_tokens: Longest response.
        group_size: Responses to a question.
        shares_prefixes: Whether members of a group share rows.
        has_cache: Whether prefixes come from an experience cache.
        temperature: Sampling temperature.
        checkpointing: Whether activations are computed again in the backward pass.
        accumulate_sharded: With FSDP2, whether gradients are reduced after every micro-batch.
        bucket_view: With DDP, whether gradients are views of its buckets.
        offloads_optimizer: Whether DeepSpeed holds master weights and optimizer states in the CPU's memory.
        offloads_parameters: Whether ZeRO-3 holds parameters there.
        bucket_elements: DeepSpeed's ``reduce_bucket_size``.
        overlaps: Whether DeepSpeed reduces while it computes, which takes a second bucket.
        has_reference: Whether the objective needs a frozen copy of the starting policy.
        engine: The rollout engine.
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
        """Processes that train, one a device."""
        return self.devices * self.nodes

    @property
    def longest(self) -> int:
        """Tokens of the longest row of one response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch: a row longer than the limit makes one of its own (``rows.py``)."""
        return max(self.micro_batch_tokens, self.longest)

    @property
    def casts_weights(self) -> bool:
        """Whether autocast casts weights at every use; FSDP2 and DeepSpeed give them out in 16 bits."""
        return self.precision is Precision.MIXED and self.sharding in (Sharding.SINGLE, Sharding.DDP)


@dataclass(frozen=True)
class Part:
    """Bytes on each device that something takes, by moment.

    Attributes:
        name: What it is.
        rollout: While responses are generated.
        backward: At the end of a forward pass and in the backward pass of the largest micro-batch.
        step: While the optimizer makes its step.
    """

    name: str
    rollout: float = 0.0
    backward: float = 0.0
    step: float = 0.0

    @classmethod
    def always(cls, name: str, size: float) -> Part:
        """Something that is there all the time."""
        return cls(name, size, size, size)
