"""Log-probs of responses under a model: one forward pass over a micro-batch of rows.

If no row is shared, rows are stacked and padded on the right, and the model makes its usual mask. Otherwise rows are
concatenated without padding, and ``attention.py`` separates them.

Without gradient through the prefix a first pass computes the contexts and stores their keys and values only. The last
token of each context predicts the first token of its suffixes; it is computed in the second pass, with the suffixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpo_lightning.policy.output_head import scoring, token_scores
from rpo_lightning.policy.prefix_sharing.attention import DetachedContexts
from rpo_lightning.policy.prefix_sharing.held_context import HeldContext, contexts_of
from rpo_lightning.policy.prefix_sharing.layout import BatchLayout
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs and entropies of the tokens in the loss scope, right-aligned, for a micro-batch.

    Attributes:
        rows: The rows, in the order of the tensors.
        logprobs_BS: Log-probs of the tokens, with gradient where torch records one.
        entropy_BS: Entropy of the next-token distribution, with gradient only if that was asked for.
        mask_BS: True at tokens in the scope, False at padding.
        lengths: Number of tokens in the scope of each response, on the host.
    """

    rows: list[Row]
    logprobs_BS: Tensor
    entropy_BS: Tensor
    mask_BS: Tensor
    lengths: list[int]


def token_logprobs(
    model: PreTrainedModel,
    batch: Sequence[SharedRow],
    temperature: float,
    pad_id: int,
    device: torch.device,
    full_logits: bool = False,
    prefix_gradient: bool = True,
    context: HeldContext | None = None,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """Log-probs and entropies of the tokens in the loss scope of every response.

    Args:
        model: The policy or the reference.
        batch: The rows of one micro-batch.
        temperature: The sampling temperature; it divides the logits.
        pad_id: Any token id; fills padded positions.
        device: Where the model is.
        full_logits: Compute the logits of all positions. Models that change logits after their output head need it.
        prefix_gradient: Whether the gradient goes through the context. Without it the loss scope must be the suffix.
        context: The context of the only row, if it is computed once for several passes; the loss scope must be the
            suffix.
        entropy_gradient: Whether the entropies have a gradient.

    Raises:
        UpdateError: Rows are concatenated, and the model has another attention than ``attention.py``'s.
    """
    if prefix_gradient and context is None:
        layout, detached = BatchLayout(batch, pad_id), None
    else:
        lengths = [len(shared.context_ids) - 1 for shared in batch]
        layout = BatchLayout(batch, pad_id, lengths, concatenated=True)
        detached = _detached(model, batch, lengths, device) if context is None else context.leaves(model, device)
    attention = model.config._attn_implementation
    inputs, targets, index_BS = layout.inputs(device, attention, temperature, entropy_gradient)
    if detached is not None:
        inputs["detached_contexts"] = detached
    if full_logits:
        logits_BTV = model(**inputs).logits
        logits_KV = logits_BTV.flatten(0, 1)[targets.position_K]
        scores = token_scores(logits_KV, targets.token_K, temperature, entropy_gradient)
    else:
        with scoring(model, targets):
            scores = model(**inputs).logits
    mask_BS = index_BS >= 0
    index_BS = index_BS.clamp(min=0)
    entropy_BS = scores[1][index_BS]
    entropy_BS = entropy_BS if entropy_gradient else entropy_BS.detach()
    return TokenLogprobs(layout.rows, scores[0][index_BS], entropy_BS, mask_BS, layout.lengths)


def _detached(
    model: PreTrainedModel, batch: Sequence[SharedRow], lengths: Sequence[int], device: torch.device
) -> DetachedContexts | None:
    """Keys and values of the first ``lengths`` tokens of every context, without gradient; ``None`` without tokens."""
    contexts = [shared.context_ids[:length] for shared, length in zip(batch, lengths, strict=True) if length]
    with torch.no_grad():
        return contexts_of(model, contexts, device) if contexts else None
