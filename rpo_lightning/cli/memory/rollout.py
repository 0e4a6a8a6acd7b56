"""Memory of the rollout engine.

vLLM takes a share of the device's memory for weights and key–value cache, whatever it needs, and says so if that is
not free when it starts (``vllm/v1/worker/utils.py``, ``request_memory``). Asleep (``VLLMEngine.sleep``) it gives back
weights and cache; graphs and workspaces stay, which is assumed to be ``ASLEEP_BYTES``.

The transformers engine decodes with the policy's own weights and needs keys and values of its sequences: layers × 2 ×
key × tokens, with room for 128 tokens more, one layer of it twice while it grows; logits of all sequences, in fp32 and
as log-probs and probabilities; and the prompts' activations in one layer. Where members of a group share rows in
training they have one copy of their prompt here, but for less than 2 MB a layer (``engines/sequence_cache.py``).
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan

ASLEEP_BYTES = 2**30
# engines/vllm_platform.py, CPU_CACHE_BYTES; not imported, so that no engine is.
_CPU_CACHE_BYTES = 2 * 2**30
_ROOM = 128


def engine_weight_bytes(shape: ModelShape, plan: Plan) -> float:
    """Weights that vLLM holds on each rank: merged, not quantised."""
    size = plan.engine.bytes_per_number or min(plan.precision.computed, 4)
    base = shape.parameters if not shape.has_adapter else shape.frozen + shape.quantized
    return base * size / plan.engine.tensor_parallel


def least_engine_bytes(shape: ModelShape, plan: Plan) -> float:
    """What vLLM's share must hold at least: its weights, and keys and values of one longest response."""
    token = shape.layers * 2 * shape.key * (plan.engine.bytes_per_number or min(plan.precision.computed, 4))
    return engine_weight_bytes(shape, plan) + token * plan.longest / plan.engine.tensor_parallel


def engine_parts(shape: ModelShape, plan: Plan, device_bytes: float | None) -> list[Part]:
    """The rollout engine.

    Args:
        shape: The model.
        plan: The settings.
        device_bytes: Memory of a device; if it is not given, vLLM's share on a GPU is left out.
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
    return [Part("keys and values", rollout=cache), Part("logits and prompts", rollout=max(logits, prefill))]
