"""Finds settings that lower a run's memory: changes one at a time and estimates again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rpo_lightning.cli.memory.estimate import Estimate, estimate
from rpo_lightning.cli.memory.optimizers import OptimizerState
from rpo_lightning.cli.memory.plan import Plan, Sharding


def remedies(found: Estimate, quantization: str | None = None) -> list[tuple[str, Estimate]]:
    """Single changes that lower the peak, the most effective first.

    Args:
        found: The estimate to improve.
        quantization: As in ``estimate``.

    Returns:
        Pairs of a change, in words, and the estimate with it.
    """
    tried = [
        (text, estimate(found.shape, plan, quantization, found.device_bytes)) for text, plan in _changes(found.plan)
    ]
    return sorted(
        (
            pair
            for pair in tried
            if pair[1].smallest_device < 0.999 * found.smallest_device and pair[1].engine_lacks <= found.engine_lacks
        ),
        key=lambda pair: pair[1].smallest_device,
    )


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if not plan.checkpointing:
        yield "model.update.gradient_checkpointing: true", replace(plan, checkpointing=True)
    smaller = max(plan.longest, plan.tokens // 2)
    if smaller < plan.tokens:
        yield f"model.update.micro_batch_tokens: {smaller}", replace(plan, micro_batch_tokens=smaller)
    if plan.sharding is Sharding.FSDP2 and not plan.accumulate_sharded:
        yield "model.update.accumulate_sharded: true", replace(plan, accumulate_sharded=True)
    if plan.ranks > 1 and plan.sharding in (Sharding.DDP, Sharding.ZERO1, Sharding.ZERO2):
        yield (
            "FSDP2 (ModelParallelStrategy) with model.update.accumulate_sharded: true",
            replace(plan, sharding=Sharding.FSDP2, accumulate_sharded=True, offloads_optimizer=False),
        )
    if plan.sharding is Sharding.DDP and not plan.bucket_view:
        yield "DDPStrategy with gradient_as_bucket_view: true", replace(plan, bucket_view=True)
    if plan.sharding.is_zero and not plan.offloads_optimizer:
        yield "DeepSpeed with offload_optimizer: true", replace(plan, offloads_optimizer=True)
    if plan.optimizer.temporaries and not plan.sharding.is_zero and plan.on_gpu:
        yield (
            "model.optimizer with fused: true",
            replace(plan, optimizer=replace(plan.optimizer, temporaries=0)),
        )
    if plan.optimizer.tensors == 2 and not plan.optimizer.eight_bit and plan.on_gpu and not plan.offloads_optimizer:
        eight = OptimizerState("AdamW8bit", 2, eight_bit=True)
        yield "model.optimizer: bitsandbytes.optim.AdamW8bit", replace(plan, optimizer=eight)
    yield from _engine_changes(plan)


def _engine_changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    engine = plan.engine
    if not engine.is_vllm:
        if engine.sequences > 2 * plan.group_size:
            half = engine.sequences // 2
            yield f"model.engine.max_sequences: {half}", replace(plan, engine=replace(engine, sequences=half))
        return
    if plan.on_gpu and engine.sleep_level == 0:
        yield "model.engine.sleep_level: 2", replace(plan, engine=replace(engine, sleep_level=2))
    if plan.on_gpu and engine.gpu_share > 0.3:
        share = round(engine.gpu_share - 0.1, 2)
        yield f"model.engine.gpu_memory_utilization: {share}", replace(plan, engine=replace(engine, gpu_share=share))
