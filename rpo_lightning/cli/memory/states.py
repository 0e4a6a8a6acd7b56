"""Memory of weights, gradients and optimizer states, and of what strategies gather and buffer.

With P parameters that train, F that do not, N ranks, *held* and *computed* bytes of a number (``Precision``) and S
bytes of optimizer states a parameter:

====================  ==================  ======================================  ==============
strategy              weights             gradients                               states
====================  ==================  ======================================  ==============
one device, DDP       held (P + F)        held P; DDP's buckets as much again     S P
FSDP2                 held (P + F) / N    held P / N; in the backward pass reduce P   S P / N
ZeRO-1                computed (P + F)    computed P                              (4 + S) P / N
ZeRO-2                computed (P + F)    computed P / N + buckets                (4 + S) P / N
ZeRO-3                computed (P+F) / N  computed P / N + buckets                (4 + S) P / N
====================  ==================  ======================================  ==============

Where from: ``ShardedAccumulation`` leaves gradients whole until the last micro-batch, in the dtype they are reduced
in (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``); ZeRO's partitions are those of Rajbhandari et al., arXiv
1910.02054, its buffers those of ``deepspeed/runtime/zero`` with Lightning's ``reduce_bucket_size``. Gradients outlive
the step with all but DeepSpeed: the module empties them when the next update begins.
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan, Precision, Sharding

# NF4 with double quantisation: half a byte, a byte for 64 numbers, 4 for 256 of those (Dettmers et al., 2305.14314).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults, in parameters (deepspeed/runtime/zero/config.py).
_ZERO3_LIVE, _ZERO3_PREFETCH = 1_000_000_000, 50_000_000


def trained_bytes(shape: ModelShape, plan: Plan) -> int:
    """Bytes of a number that trains: PEFT holds adapters in fp32 beside 16-bit weights."""
    held = plan.precision.computed if plan.sharding.is_zero else plan.precision.held
    return max(held, 4) if shape.has_adapter and not plan.sharding.is_zero else held


def reduced_bytes(shape: ModelShape, plan: Plan) -> int:
    """Bytes of a gradient's number as FSDP2 reduces it (``sharding.shard``)."""
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
        # A copy made while the policy is whole; FSDP2 shards it, too, ZeRO-3 does not.
        of_reference = shape.parameters * held / (share if plan.sharding is Sharding.FSDP2 else 1)
        parts.append(Part.always("reference policy", of_reference))
    return parts


def quantized_bytes(shape: ModelShape, quantization: str | None) -> float:
    """Bytes of the weights that bitsandbytes holds; the 8-bit ones have an fp32 scale a row."""
    if quantization == "8bit":
        return shape.quantized + 4 * shape.quantized_rows
    return shape.quantized * _NF4_BYTES


def gradient_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Gradients between passes, and those in flight."""
    trained = trained_bytes(shape, plan)
    whole = shape.trainable * trained
    if plan.sharding in (Sharding.SINGLE, Sharding.DDP):
        # The newest gradient of a parameter, in the dtype it is computed in and as it is added.
        in_flight = shape.largest * (trained + (plan.precision.computed if plan.casts_weights else 0))
        parts = [Part.always("gradients", whole), Part("newest gradient", backward=in_flight)]
        if plan.sharding is Sharding.DDP and not plan.bucket_view:
            parts.append(Part.always("DDP's buckets", whole))
        return parts
    if plan.sharding is Sharding.FSDP2:
        shard = whole / plan.ranks
        if plan.accumulate_sharded:
            return [Part.always("gradients", shard)]
        unsharded = shape.trainable * reduced_bytes(shape, plan)
        return [Part("gradients (whole until the last pass)", shard, max(unsharded, shard), shard)]
    bucket = min(plan.bucket_elements, shape.trainable) * trained * (2 if plan.overlaps else 1)
    kept = whole if plan.sharding is Sharding.ZERO1 else 0 if plan.offloads_optimizer else whole / plan.ranks
    return [Part("gradients", backward=kept, step=kept), Part("DeepSpeed's buckets", backward=bucket)]


def optimizer_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Optimizer states, DeepSpeed's master weights, and what a step makes besides."""
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
    # Without a GPU torch makes the step parameter by parameter.
    made = plan.optimizer.temporaries * (mine if plan.on_gpu else min(shape.largest, mine))
    return [
        Part.always("optimizer states", mine * plan.optimizer.bytes_per_parameter(trained)),
        Part("temporaries of the step", step=made * trained),
    ]


def gathered_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """What a rank holds of other ranks' shards for a while.

    FSDP2: the root unit (embeddings and head) all the time, the layer at work, the next one and its receive buffer,
    and two layers' gradients on their way. Decoding on transformers gathers everything; vLLM is given one parameter
    at a time. ZeRO-3: what may stay live.
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
