"""Memory of activations: what a forward pass saves for the backward pass.

The counts are for decoder layers like Llama's: RMS norm, grouped-query attention with rotary embeddings, gated MLP.
Attention uses a fused kernel, which saves no scores of token pairs. Other architectures are counted as if they were
like this. Bytes for each token, with the widths of ``ModelShape``, c the bytes of a number in the precision of the
computation, and n those of the residual stream (4 under autocast, otherwise c):

* each of two norms: input in fp32, 4 hidden; normalised, n hidden; output, c hidden. Under autocast each of the
  following matrices (three and two) saves a cast of its own. In fp32, output and cast are the same tensor.
* attention: queries and output, 2 c query; keys and values, 2 c key; log-sum-exps, 4 heads.
* MLP: gate, its activation, up, their product: 4 c intermediate.
* under autocast, a 16-bit copy of every matrix, because Lightning turns autocast's cache off.

With gradient checkpointing, every layer saves its input (n hidden), and one layer at a time has the rest.
``tests/cli/test_memory.py`` compares the counts with what autograd saves: within 2 % for plain rows, 10 % for others.
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan, Precision
from rpo_lightning.policy.output_head import CHUNK_ELEMENTS


def residual_bytes(plan: Plan) -> int:
    """Bytes of a number in the residual stream."""
    return plan.precision.held if plan.casts_weights else plan.precision.computed


def layer_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """Bytes that one decoder layer saves for a token of a plain row."""
    c, residual = plan.precision.computed, residual_bytes(plan)
    norm = max(residual, 4) + (0 if shape.has_adapter else residual)
    outputs = 5 * c if plan.casts_weights else 2 * c
    norms = (2 * norm + outputs) * shape.hidden + 8
    attention = 2 * c * (shape.query + shape.key) + 4 * shape.heads
    if shape.query_norms:
        attention += (4 + c) * (shape.query + shape.key) + 4 * (shape.heads + shape.key_heads)
    return norms + attention + 4 * c * shape.intermediate + _adapter_bytes(shape, plan)


def _adapter_bytes(shape: ModelShape, plan: Plan) -> float:
    """Inputs and outputs that an adapter's matrices save. With 16-bit weights the inputs are cast to fp32."""
    if not shape.has_adapter:
        return 0
    c = plan.precision.computed
    if plan.casts_weights:
        return c * (shape.adapter_ranks + shape.query)
    if c >= 4:
        return c * shape.adapter_ranks
    # Beside the casts, the frozen matrices do not save their own inputs.
    return 4 * (shape.adapter_ranks + shape.adapter_inputs) - c * (2 * shape.hidden + shape.intermediate)


def shared_row_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """Bytes that attention in one layer saves for a token of a shared row, beyond those of a plain row, at worst.

    * On a GPU in 16 bits: none (``policy/prefix_sharing/gpu.py``, if ``gpu_check.py`` allows it).
    * On a CPU: the merged output.
    * On a GPU in fp32: the merged output, and for each member a copy of the context's keys and values with as many
      heads as the queries. A row of a context of t tokens and G suffixes of s tokens has t + G s tokens and G (t + s)
      copies. The ratio is nearly G for long contexts (RPO), and smaller if only prompts are shared.
    """
    c = plan.precision.computed
    if not plan.shares_prefixes or (plan.on_gpu and c == 2):
        return 0
    if not plan.on_gpu:
        return c * shape.query
    members, context = plan.group_size, plan.prompt_tokens
    if plan.has_cache:
        ratio = float(members)
    else:
        members = min(members, max(1, (plan.tokens - context) // plan.response_tokens))
        ratio = members * plan.longest / (context + members * plan.response_tokens)
    return c * shape.query * (1 + (2 * ratio if members > 1 else 0))


def cast_bytes(shape: ModelShape, plan: Plan) -> float:
    """Bytes of the 16-bit copies of one layer's matrices under autocast. Quantised matrices are not copied."""
    is_quantized = shape.quantized > 0
    return 0 if is_quantized or not plan.casts_weights else plan.precision.computed * shape.layer_parameters


def activation_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Activations of the largest micro-batch."""
    tokens = plan.tokens
    layer = tokens * (layer_bytes_per_token(shape, plan) + shared_row_bytes_per_token(shape, plan))
    layer += cast_bytes(shape, plan)
    parts = [Part("activations kept", backward=shape.layers * layer + around_layers_bytes(shape, plan, tokens))]
    if plan.checkpointing:
        saved = shape.layers * tokens * shape.hidden * residual_bytes(plan) + around_layers_bytes(shape, plan, tokens)
        parts = [Part("activations kept", backward=saved), Part("one layer's, computed again", backward=layer)]
    # The gradients in memory at the same time: three of the MLP's width and two of the residual stream's.
    c = plan.precision.computed
    flowing = tokens * (3 * c * shape.intermediate + 2 * residual_bytes(plan) * shape.hidden)
    return [*parts, Part("gradients of activations", backward=flowing), head_part(shape, plan)]


def around_layers_bytes(shape: ModelShape, plan: Plan, tokens: int) -> float:
    """Bytes of activations outside the decoder layers: token ids, rotary embeddings and the last norm."""
    residual = residual_bytes(plan)
    rotary = 2 * residual * shape.query // shape.heads
    return tokens * (8 + rotary + shape.hidden * (max(residual, 4) + (0 if shape.has_adapter else residual)) + 4)


def chunk_positions(shape: ModelShape, scored: int) -> int:
    """Positions whose logits the output head computes at a time (``policy/output_head.py``, ``scoring``)."""
    return min(scored, max(1, CHUNK_ELEMENTS // shape.vocabulary))


def head_part(shape: ModelShape, plan: Plan) -> Part:
    """The output head at work, if all tokens are scored (``policy/output_head.py``).

    It holds all hidden states, and for one chunk the logits as computed, log-probs and probabilities in fp32, and the
    scaled logits if they are another tensor. Under autocast it also holds a copy of its weights.
    """
    computed, residual = plan.precision.computed, residual_bytes(plan)
    is_scaled_apart = computed < 4 or plan.temperature != 1
    numbers = chunk_positions(shape, plan.tokens) * shape.vocabulary
    exact = max(4, computed)
    chunk = numbers * (computed + exact * (3 if is_scaled_apart else 2))
    copy = computed * shape.vocabulary * shape.hidden if plan.casts_weights else 0
    return Part("output head, a chunk of logits", backward=plan.tokens * shape.hidden * residual + chunk + copy)


def saved_by_head_bytes(shape: ModelShape, plan: Plan, scored: int) -> float:
    """Bytes that the head saves if one chunk holds all scored tokens: hidden states, probabilities, casts."""
    residual = residual_bytes(plan)
    saved = scored * (shape.hidden * residual + shape.vocabulary * max(4, plan.precision.computed))
    if plan.precision is Precision.MIXED and plan.casts_weights:
        saved += plan.precision.computed * shape.hidden * (scored + shape.vocabulary)
    return saved
