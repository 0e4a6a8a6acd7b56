"""Memory of the rollout engine.

vLLM takes a fixed share of the device's memory for weights and key-value cache, and refuses to start if that much is
not free (``vllm/v1/worker/utils.py``, ``request_memory``). Asleep (``VLLMEngine.sleep``) it frees weights and cache.
Its graphs and workspaces stay; they are assumed to take ``ASLEEP_BYTES``.

The transformers engine decodes with the policy's own weights. It needs

* keys and values of its sequences: layers × 2 × key × tokens, with room for 128 more tokens. One layer's are held
  twice while they grow.
* logits of all sequences, in fp32 and as log-probs and probabilities.
* the prompts' activations in one layer.

If members of a group share rows in training, a group has one copy of its context's keys and values. On a CPU that holds
only above 2 MB a layer (``rollout/transformers/sequence_cache.py``), which is ignored here.
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan

ASLEEP_BYTES = 2**30
# CPU_CACHE_BYTES of rollout/vllm/platform.py. Not imported, because that would import the engine.
_CPU_CACHE_BYTES = 2 * 2**30
_ROOM = 128


def engine_weight_bytes(shape: ModelShape, plan: Plan) -> float:
    """Bytes of vLLM's weights on each rank: nothing is quantised. Adapters are merged, or small and not counted."""
    size = plan.engine.bytes_per_number or min(plan.precision.computed, 4)
    base = shape.parameters if not shape.has_adapter else shape.frozen + shape.quantized
    return base * size / plan.engine.tensor_parallel


def least_engine_bytes(shape: ModelShape, plan: Plan) -> float:
    """The least that vLLM's share must hold, in bytes: its weights, and keys and values of one longest row."""
    token = shape.layers * 2 * shape.key * (plan.engine.bytes_per_number or min(plan.precision.computed, 4))
    return engine_weight_bytes(shape, plan) + token * plan.longest / plan.engine.tensor_parallel


def engine_parts(shape: ModelShape, plan: Plan, device_bytes: float | None) -> list[Part]:
    """The parts of the rollout engine.

    Args:
        shape: The model.
        plan: The settings.
        device_bytes: Memory of a device. Without it, vLLM's share on a GPU is not counted.
    """
    if not plan.engine.is_vllm:
        return _decoding_parts(shape, plan)
    if not plan.on_gpu:
        return [Part.always("vLLM, awake throughout", engine_weight_bytes(shape, plan) + _CPU_CACHE_BYTES)]
    taken = plan.engine.gpu_share * (device_bytes or 0)
    if plan.engine.sleep_level == 0:
        return [Part.always("vLLM, awake throughout", taken)]
    asleep = ASLEEP_BYTES if device_bytes is None else min(ASLEEP_BYTES, taken)
    return [Part("vLLM, asleep in the update", taken, asleep, asleep)]


def _decoding_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    sequences = max(plan.group_size, plan.engine.sequences)
    held = plan.precision.held if plan.casts_weights else plan.precision.computed
    token = shape.key * 2 * plan.precision.computed
    requests = max(1, sequences // plan.group_size)
    contexts = requests * (plan.prompt_tokens + _ROOM) if plan.shares_prefixes and plan.group_size > 1 else 0
    own = plan.response_tokens if contexts else plan.longest
    cache = (shape.layers + 1) * token * (contexts + sequences * (own + _ROOM))
    logits = sequences * shape.vocabulary * (plan.precision.computed + 12)
    prompts = requests * (plan.longest if plan.has_cache else plan.prompt_tokens)
    prefill = prompts * (held * 3 * shape.hidden + plan.precision.computed * 3 * shape.intermediate)
    parts = [Part("keys and values", rollout=cache), Part("logits and prompts", rollout=max(logits, prefill))]
    if plan.casts_weights:  # autocast keeps its casts of weights that train until the rollout ends
        parts.append(Part("weights in 16 bits", rollout=shape.trainable * plan.precision.computed))
    return parts
