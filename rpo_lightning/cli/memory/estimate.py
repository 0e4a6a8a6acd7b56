"""Adds up the parts of a run's memory on each device, for each moment: rollout, backward pass, optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_lightning.cli.memory.activations import activation_parts
from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan, Sharding
from rpo_lightning.cli.memory.rollout import engine_parts, engine_weight_bytes, least_engine_bytes
from rpo_lightning.cli.memory.states import gathered_parts, gradient_parts, optimizer_parts, weight_parts

MOMENTS = ("rollout", "backward", "step")
# Memory of CUDA, cuBLAS and NCCL on every GPU, without tensors. Assumed, not measured.
CUDA_BYTES = 2**30


@dataclass(frozen=True)
class Estimate:
    """An estimate of memory in bytes.

    Attributes:
        shape: The model.
        plan: The settings.
        parts: The parts of a device's memory.
        host: The parts of a rank's CPU memory, as pairs of name and bytes.
        device_bytes: Memory of a device; ``None`` if it is not known.
    """

    shape: ModelShape
    plan: Plan
    parts: tuple[Part, ...]
    host: tuple[tuple[str, float], ...]
    device_bytes: float | None = None

    def total(self, moment: str) -> float:
        """Sum over the parts at a moment (``rollout``, ``backward`` or ``step``)."""
        return sum(getattr(part, moment) for part in self.parts)

    @property
    def peak(self) -> float:
        """The largest sum of all moments."""
        return max(self.total(moment) for moment in MOMENTS)

    @property
    def smallest_device(self) -> float:
        """Bytes of the smallest device that holds the run, vLLM's share included."""
        if not (self.plan.on_gpu and self.plan.engine.is_vllm) or self.device_bytes is not None:
            return self.peak
        free = 1 - self.plan.engine.gpu_share
        awake = MOMENTS if self.plan.engine.sleep_level == 0 else MOMENTS[:1]
        return max(self.total(moment) / (free if moment in awake else 1) for moment in MOMENTS)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into a device; ``None`` if the device's memory is not known."""
        return None if self.device_bytes is None else self.peak <= self.device_bytes and not self.engine_lacks

    @property
    def engine_lacks(self) -> float:
        """Bytes by which vLLM's share of the device is too small for its weights and one response; 0 if they fit."""
        if not (self.plan.on_gpu and self.plan.engine.is_vllm) or self.device_bytes is None:
            return 0.0
        return max(least_engine_bytes(self.shape, self.plan) - self.plan.engine.gpu_share * self.device_bytes, 0.0)


def estimate(
    shape: ModelShape, plan: Plan, quantization: str | None = None, device_bytes: float | None = None
) -> Estimate:
    """Estimate the memory of a run.

    Args:
        shape: The model.
        plan: The settings.
        quantization: ``4bit`` or ``8bit`` if frozen weights are quantised.
        device_bytes: Memory of a device. Without it, vLLM's share is not counted.
    """
    parts = [
        *weight_parts(shape, plan, quantization),
        *gradient_parts(shape, plan),
        *optimizer_parts(shape, plan),
        *gathered_parts(shape, plan),
        *activation_parts(shape, plan),
        *engine_parts(shape, plan, device_bytes),
    ]
    if plan.on_gpu:
        parts.append(Part.always("CUDA and its libraries (assumed)", CUDA_BYTES))
    present = tuple(part for part in parts if any(getattr(part, moment) for moment in MOMENTS))
    return Estimate(shape, plan, present, tuple(_host_parts(shape, plan)), device_bytes)


def _host_parts(shape: ModelShape, plan: Plan) -> list[tuple[str, float]]:
    """CPU memory of a rank that trains on a GPU."""
    if not plan.on_gpu:
        return []
    parts: list[tuple[str, float]] = []
    if plan.sharding in (Sharding.FSDP2, Sharding.ZERO3):
        copies = 2 if plan.has_reference and not shape.has_adapter else 1
        parts.append(("the whole policy while it is loaded", copies * shape.parameters * plan.precision.held))
    mine = shape.trainable / plan.ranks
    if plan.offloads_optimizer:
        states = plan.optimizer.bytes_per_parameter(4)
        parts.append(("master weights, gradients and optimizer states", mine * (8 + states)))
    if plan.offloads_parameters:
        parts.append(("parameters", shape.parameters * plan.precision.computed / plan.ranks))
    if plan.engine.is_vllm and plan.engine.sleep_level == 1:
        parts.append(("vLLM's weights while it sleeps", engine_weight_bytes(shape, plan)))
    return parts
