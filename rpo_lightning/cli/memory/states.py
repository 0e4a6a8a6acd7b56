"""Memory of weights, gradients and optimizer states, and of the strategies' buffers.

P is the number of parameters that train, F of those that do not, N of ranks. *held* and *computed* are bytes of a
number (``Precision``). *reduce* is bytes of a number as gradients are reduced. S is bytes of optimizer states for a
parameter.

| strategy | weights | gradients | states |
| --- | --- | --- | --- |
| one device, DDP | held (P + F) | held P; DDP's buckets as much again | S P |
| FSDP2 | held (P + F) / N | held P / N; in the backward pass reduce P | S P / N |
| ZeRO-1 | computed (P + F) | computed P | (4 + S) P / N |
| ZeRO-2 | computed (P + F) | computed P / N + buckets | (4 + S) P / N |
| ZeRO-3 | computed (P+F) / N | computed P / N + buckets | (4 + S) P / N |

Sources: FSDP2's gradients are whole until the last micro-batch (``ShardedAccumulation``), in the dtype of their
reduction (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``). ZeRO's partitions are from Rajbhandari et al.,
arXiv 1910.02054, its buffers from ``deepspeed/runtime/zero`` with Lightning's ``reduce_bucket_size``. Gradients are
freed after the step.
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan, Precision, Sharding

# NF4 with double quantisation: half a byte for each number, a byte for every 64 numbers, and 4 bytes for every 256 of
# those bytes (Dettmers et al., arXiv 2305.14314).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults, in parameters (deepspeed/runtime/zero/config.py).
_ZERO3_LIVE, _ZERO3_PREFETCH = 1_000_000_000, 50_000_000


def trained_bytes(shape: ModelShape, plan: Plan) -> int:
    """Bytes of a number that trains. PEFT holds adapters in fp32 even if the weights have 16 bits."""
    held = plan.precision.computed if plan.sharding.is_zero else plan.precision.held
    return max(held, 4) if shape.has_adapter and not plan.sharding.is_zero else held


def reduced_bytes(shape: ModelShape, plan: Plan) -> int:
    """Bytes of a number of a gradient as FSDP2 reduces it (``policy/parallel/fsdp2.py``, ``shard``)."""
    return 4 if plan.precision is Precision.MIXED else trained_bytes(shape, plan)


def weight_parts(shape: ModelShape, plan: Plan, quantization: str | None) -> list[Part]:
    """Trainable and frozen weights."""
    held = plan.precision.computed if plan.sharding.is_zero else plan.precision.held
    share = plan.ranks if plan.sharding in (Sharding.FSDP2, Sharding.ZERO3) else 1
    frozen = shape.frozen * held + quantized_bytes(shape, quantization)
    parts = [
        Part.always("weights that train", shape.trainable * trained_bytes(shape, plan) / share),
        Part.always("frozen weights", frozen / share),
    ]
    if plan.offloads_parameters:
        parts = []
    if plan.has_reference and not shape.has_adapter:
        # FSDP2 shards the copy too, ZeRO-3 does not.
        of_reference = shape.parameters * held / (share if plan.sharding is Sharding.FSDP2 else 1)
        parts.append(Part.always("reference policy", of_reference))
    return parts


def quantized_bytes(shape: ModelShape, quantization: str | None) -> float:
    """Bytes of the weights that bitsandbytes holds. 8-bit weights have an fp32 scale for each row."""
    if quantization == "8bit":
        return shape.quantized + 4 * shape.quantized_rows
    return shape.quantized * _NF4_BYTES


def gradient_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Accumulated gradients, and gradients that a backward pass holds for a short time."""
    trained = trained_bytes(shape, plan)
    whole = shape.trainable * trained
    if plan.sharding in (Sharding.SINGLE, Sharding.DDP):
        # A parameter's new gradient, as computed and as it is added to the accumulated one.
        in_flight = shape.largest * (trained + (plan.precision.computed if plan.casts_weights else 0))
        # They are freed after the step, except where they are views of DDP's buckets.
        kept = whole if plan.sharding is Sharding.DDP and plan.bucket_view else 0.0
        parts = [Part("gradients", kept, whole, whole), Part("newest gradient", backward=in_flight)]
        if plan.sharding is Sharding.DDP and not plan.bucket_view:
            parts.append(Part.always("DDP's buckets", whole))
        return parts
    if plan.sharding is Sharding.FSDP2:
        shard = whole / plan.ranks
        if plan.accumulate_sharded:
            return [Part("gradients", backward=shard, step=shard)]
        unsharded = shape.trainable * reduced_bytes(shape, plan)
        return [Part("gradients (whole until the last pass)", 0.0, max(unsharded, shard), shard)]
    bucket = min(plan.bucket_elements, shape.trainable) * trained * (2 if plan.overlaps else 1)
    own = whole if plan.sharding is Sharding.ZERO1 else 0 if plan.offloads_optimizer else whole / plan.ranks
    return [Part("gradients", backward=own, step=own), Part("DeepSpeed's buckets", backward=bucket)]


def optimizer_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Optimizer states, DeepSpeed's master weights, and temporaries of a step."""
    trained = trained_bytes(shape, plan)
    if plan.sharding.is_zero:
        if plan.offloads_optimizer:
            return []
        mine = shape.trainable / plan.ranks
        return [
            Part.always("fp32 master weights", 4 * mine),
            Part.always("optimizer states", mine * plan.optimizer.bytes_per_parameter(4)),
            Part("temporaries of the step", step=4 * mine * (1 + plan.optimizer.temporaries)),
        ]
    mine = shape.trainable / (plan.ranks if plan.sharding is Sharding.FSDP2 else 1)
    # On a CPU, torch steps one parameter at a time.
    made = plan.optimizer.temporaries * (mine if plan.on_gpu else min(shape.largest, mine))
    return [
        Part.always("optimizer states", mine * plan.optimizer.bytes_per_parameter(trained)),
        Part("temporaries of the step", step=made * trained),
    ]


def gathered_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Other ranks' shards that a rank holds for a while.

    In the backward pass, FSDP2 holds the root unit (embeddings and head), the current layer, the next one with its
    receive buffer, and the gradients of two layers. ZeRO-3 holds what its limits of live and prefetched parameters
    allow. In the rollout, the transformers engine gathers the whole policy; vLLM gets one parameter at a time.
    """
    computed = plan.precision.computed
    if plan.sharding is Sharding.FSDP2:
        layers = shape.layer_parameters * (3 * computed + 2 * reduced_bytes(shape, plan))
        backward = shape.root_parameters * computed + layers
    elif plan.sharding is Sharding.ZERO3:
        backward = min(shape.parameters, _ZERO3_LIVE + _ZERO3_PREFETCH) * computed
    else:
        return []
    largest = max(shape.largest, shape.root_parameters // 2)
    rollout = largest * plan.precision.held if plan.engine.is_vllm else shape.parameters * computed
    return [Part("gathered from other ranks", rollout, backward)]
