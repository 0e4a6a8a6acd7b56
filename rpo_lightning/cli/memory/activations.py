"""Memory of what a forward pass keeps for the backward pass.

Counted for decoder layers of the Llama kind (RMS norm, grouped-query attention with rotary embeddings through a fused
kernel, so that there are no scores of token pairs, gated MLP), token by token; widths as in ``ModelShape``, c bytes of
a number in the precision that is computed in, n that of the residual stream (c, but fp32 under autocast):

* two norms, each: input in fp32, 4 hidden; normalised, n hidden; output, c hidden. Under autocast each of the matrices
  that follow (three and two) keeps a cast of its own; in fp32 output and cast are one.
* attention: queries and output, 2 c query; keys and values, 2 c key; log-sum-exps, 4 heads.
* MLP: gate, its activation, up, their product: 4 c intermediate.
* under autocast, a 16-bit copy of every matrix, since Lightning switches autocast's own cache off.

With gradient checkpointing a layer keeps its input (n hidden), and one layer at a time has the rest. Compared with what
autograd saves in ``tests/test_memory.py`` (plain rows within 2 %, the rest within 10 %); other architectures are taken
to be like this one.
"""

from __future__ import annotations

from rpo_lightning.cli.memory.model import ModelShape
from rpo_lightning.cli.memory.plan import Part, Plan, Precision
from rpo_lightning.policy.output_head import CHUNK_ELEMENTS


def residual_bytes(plan: Plan) -> int:
    """Bytes of a number of the residual stream."""
    return plan.precision.held if plan.casts_weights else plan.precision.computed


def layer_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """What one decoder layer keeps for a token in a row of its own."""
    c, residual = plan.precision.computed, residual_bytes(plan)
    norm = max(residual, 4) + (0 if shape.has_adapter else residual)
    outputs = 5 * c if plan.casts_weights else 2 * c
    norms = (2 * norm + outputs) * shape.hidden + 8
    attention = 2 * c * (shape.query + shape.key) + 4 * shape.heads
    if shape.query_norms:
        attention += (4 + c) * (shape.query + shape.key) + 4 * (shape.heads + shape.key_heads)
    return norms + attention + 4 * c * shape.intermediate + _adapter_bytes(shape, plan)


def _adapter_bytes(shape: ModelShape, plan: Plan) -> float:
    """An adapter's matrices keep their inputs (cast to fp32 beside 16-bit weights) and what they make of them."""
    if not shape.has_adapter:
        return 0
    c = plan.precision.computed
    if plan.casts_weights:
        return c * (shape.adapter_ranks + shape.query)
    if c >= 4:
        return c * shape.adapter_ranks
    # What the frozen matrices would have kept is not kept beside the casts.
    return 4 * (shape.adapter_ranks + shape.adapter_inputs) - c * (2 * shape.hidden + shape.intermediate)


def shared_row_bytes_per_token(shape: ModelShape, plan: Plan) -> float:
    """What attention of shared rows keeps beside that, in one layer, at worst.

    On a GPU in 16 bits nothing (``prefix_sharing/gpu.py``, if ``gpu_check.py`` allows it). Elsewhere its pieces are put
    together in another tensor. On a GPU in fp32 every member has a copy of the keys and values of the whole context,
    with as many heads as the queries: for a row of context t and G suffixes s that is G (t + s) for t + G s tokens,
    nearly G where contexts are long (RPO), less where only the prompt is shared.
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
    """16-bit copies of one layer's matrices; quantised ones are not copied."""
    is_quantized = shape.quantized > 0
    return 0 if is_quantized or not plan.casts_weights else plan.precision.computed * shape.layer_parameters


def activation_parts(shape: ModelShape, plan: Plan) -> list[Part]:
    """Activations of the largest micro-batch."""
    tokens = plan.tokens
    layer = tokens * (layer_bytes_per_token(shape, plan) + shared_row_bytes_per_token(shape, plan))
    layer += cast_bytes(shape, plan)
    parts = [Part("activations kept", backward=shape.layers * layer + around_layers_bytes(shape, plan, tokens))]
    if plan.checkpointing:
        kept = shape.layers * tokens * shape.hidden * residual_bytes(plan) + around_layers_bytes(shape, plan, tokens)
        parts = [Part("activations kept", backward=kept), Part("one layer's, computed again", backward=layer)]
    # Gradients of the widest activations, three of the MLP's and two of the residual stream, as they come and go.
    c = plan.precision.computed
    flowing = tokens * (3 * c * shape.intermediate + 2 * residual_bytes(plan) * shape.hidden)
    return [*parts, Part("gradients of activations", backward=flowing), head_part(shape, plan)]


def around_layers_bytes(shape: ModelShape, plan: Plan, tokens: int) -> float:
    """Token ids, rotary embeddings and the last norm."""
    residual = residual_bytes(plan)
    rotary = 2 * residual * shape.query // shape.heads
    return tokens * (8 + rotary + shape.hidden * (max(residual, 4) + (0 if shape.has_adapter else residual)) + 4)


def chunk_positions(shape: ModelShape, scored: int) -> int:
    """Positions of one chunk of logits (``output_head.scoring``)."""
    return min(scored, max(1, CHUNK_ELEMENTS // shape.vocabulary))


def head_part(shape: ModelShape, plan: Plan) -> Part:
    """The output head at work, if all tokens are scored (``output_head.py``).

    Their hidden states; and one chunk's logits as computed, log-probs and probabilities in fp32, and the scaled logits
    where they are another tensor; under autocast a copy of the head's weights.
    """
    computed, residual = plan.precision.computed, residual_bytes(plan)
    is_scaled_apart = computed < 4 or plan.temperature != 1
    numbers = chunk_positions(shape, plan.tokens) * shape.vocabulary
    exact = max(4, computed)
    chunk = numbers * (computed + exact * (3 if is_scaled_apart else 2))
    copy = computed * shape.vocabulary * shape.hidden if plan.casts_weights else 0
    return Part("output head, a chunk of logits", backward=plan.tokens * shape.hidden * residual + chunk + copy)


def saved_by_head_bytes(shape: ModelShape, plan: Plan, scored: int) -> float:
    """What the head keeps where one chunk holds all scored tokens: hidden states, probabilities, copies."""
    residual = residual_bytes(plan)
    kept = scored * (shape.hidden * residual + shape.vocabulary * max(4, plan.precision.computed))
    if plan.precision is Precision.MIXED and plan.casts_weights:
        kept += plan.precision.computed * shape.hidden * (scored + shape.vocabulary)
    return kept
