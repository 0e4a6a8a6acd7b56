"""Log-probs of responses under a model: one forward pass over a micro-batch of rows.

If no row is shared, rows are stacked and padded on the right, and the model makes its usual mask. Otherwise rows are
concatenated without padding, and ``attention.py`` separates them.

Without gradient through the prefix a first pass computes the contexts and stores their keys and values only. The last
token of each context predicts the first token of its suffixes; it is computed in the second pass, with the suffixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.policy.output_head import Targets, scoring, token_scores
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION, DetachedContexts, SharedLayout
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs and entropies of the tokens in the loss scope, right-aligned, for a micro-batch.

    Attributes:
        rows: The rows, in the order of the tensors.
        logprobs_BS: Log-probs of the tokens, with gradient where torch records one.
        entropy_BS: Entropy of the next-token distribution, without gradient.
        mask_BS: True at tokens in the scope, False at padding.
    """

    rows: list[Row]
    logprobs_BS: Tensor
    entropy_BS: Tensor
    mask_BS: Tensor


class _Layout:
    """Token ids and positions of a micro-batch, and the positions of its scored tokens.

    Args:
        batch: The rows.
        pad_id: Any token id; fills padded positions.
        detached_lengths: Number of detached tokens of each row's context; these are not computed here.
        concatenated: Concatenate rows even if none is shared.
    """

    def __init__(
        self,
        batch: Sequence[SharedRow],
        pad_id: int,
        detached_lengths: Sequence[int] | None = None,
        concatenated: bool = False,
    ) -> None:
        self.batch = batch
        self.detached_lengths = detached_lengths or [0] * len(batch)
        self.rows = [row for shared in batch for row in shared.members]
        self.is_shared = concatenated or any(shared.branches for shared in batch)
        lengths = [len(shared) - n for shared, n in zip(batch, self.detached_lengths, strict=True)]
        width = sum(lengths) if self.is_shared else max(lengths)
        shape = (1, width) if self.is_shared else (len(batch), width)
        self.ids_BT = torch.full(shape, pad_id)
        self.position_BT = torch.zeros(shape, dtype=torch.long)
        self.scored: list[tuple[int, int, int]] = []  # row, position of the predecessor, token
        self.scope_indices: list[list[int]] = []  # indices into ``scored``, one list a response
        start = 0
        for index, (shared, detached) in enumerate(zip(batch, self.detached_lengths, strict=True)):
            self._place(0 if self.is_shared else index, start, shared, detached)
            start += lengths[index] if self.is_shared else 0

    def _place(self, index: int, start: int, shared: SharedRow, detached: int) -> None:
        context = shared.context_ids[detached:]
        self._write(index, start, context, detached)
        in_scope = max(row.scope_length - len(row.suffix_ids) for row in shared.members)
        of_context = [
            self._score(index, start + position - 1, context[position])
            for position in range(len(context) - in_scope, len(context))
        ]
        last_of_context = start + len(context) - 1
        start += len(context)
        for row in shared.members:
            self._write(index, start, row.suffix_ids, detached + len(context))
            of_suffix = [
                # The first token of every suffix is predicted by the last one of the context.
                self._score(index, start + offset - 1 if offset else last_of_context, token)
                for offset, token in enumerate(row.suffix_ids)
            ]
            self.scope_indices.append([*of_context, *of_suffix])
            start += len(row.suffix_ids)

    def _write(self, index: int, start: int, ids: Sequence[int], position: int) -> None:
        stop = start + len(ids)
        self.ids_BT[index, start:stop] = torch.tensor(ids)
        self.position_BT[index, start:stop] = torch.arange(position, position + len(ids))

    def _score(self, index: int, predecessor: int, token: int) -> int:
        self.scored.append((index, predecessor, token))
        return len(self.scored) - 1

    def inputs(self, device: torch.device, attention: str) -> dict[str, Any]:
        """Arguments of the model."""
        inputs: dict[str, Any] = {"input_ids": self.ids_BT.to(device), "use_cache": False}
        if self.is_shared:
            if attention != IMPLEMENTATION:
                raise UpdateError(
                    f"shared rows need attention {IMPLEMENTATION!r}, the model has {attention!r}: call "
                    f"model.set_attn_implementation({IMPLEMENTATION!r})"
                )
            inputs["position_ids"] = self.position_BT.to(device)
            # With four dimensions the model takes it as final and makes no mask. Our attention ignores it.
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
            shapes = [
                shared.shape(detached) for shared, detached in zip(self.batch, self.detached_lengths, strict=True)
            ]
            inputs["shared_layout"] = SharedLayout(shapes, device)
        return inputs

    def targets(self, device: torch.device, temperature: float) -> Targets:
        """The scored tokens, as the output head takes them."""
        batch_K, position_K, token_K = torch.tensor(self.scored, dtype=torch.long, device=device).reshape(-1, 3).T
        return Targets(batch_K, position_K, token_K, temperature)

    def scope(self) -> tuple[Tensor, Tensor]:
        """Indices of the scope's positions into the scored tokens, right-aligned, [B, S], and their mask."""
        span = max(len(indices) for indices in self.scope_indices)
        index_BS = torch.zeros((len(self.rows), span), dtype=torch.long)
        mask_BS = torch.zeros((len(self.rows), span), dtype=torch.bool)
        for i, indices in enumerate(self.scope_indices):
            index_BS[i, span - len(indices) :] = torch.tensor(indices)
            mask_BS[i, span - len(indices) :] = True
        return index_BS, mask_BS


def token_logprobs(
    model: PreTrainedModel,
    batch: Sequence[SharedRow],
    temperature: float,
    pad_id: int,
    device: torch.device,
    full_logits: bool = False,
    prefix_gradient: bool = True,
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

    Raises:
        UpdateError: Rows are concatenated, and the model has another attention than ``attention.py``'s.
    """
    if prefix_gradient:
        layout, detached = _Layout(batch, pad_id), None
    else:
        lengths = [len(shared.context_ids) - 1 for shared in batch]
        layout = _Layout(batch, pad_id, lengths, concatenated=True)
        detached = _detached_contexts(model, batch, lengths, pad_id, device)
    targets = layout.targets(device, temperature)
    inputs = layout.inputs(device, model.config._attn_implementation)
    if detached is not None:
        inputs["detached_contexts"] = detached
    if full_logits:
        logits_BTV = model(**inputs).logits
        scores = token_scores(logits_BTV[targets.batch_K, targets.position_K], targets.token_K, temperature)
    else:
        with scoring(model, targets):
            scores = model(**inputs).logits
    index_BS, mask_BS = (x.to(device) for x in layout.scope())
    return TokenLogprobs(layout.rows, scores[0][index_BS], scores[1][index_BS].detach(), mask_BS)


def _detached_contexts(
    model: PreTrainedModel, batch: Sequence[SharedRow], lengths: Sequence[int], pad_id: int, device: torch.device
) -> DetachedContexts | None:
    """Keys and values of the first ``lengths`` tokens of every context; ``None`` if all lengths are 0."""
    detached_ids = [shared.context_ids[:length] for shared, length in zip(batch, lengths, strict=True) if length]
    if not detached_ids:
        return None
    rows = [SharedRow((Row(0, 0, ids, (), 0),)) for ids in detached_ids]
    layout, detached = _Layout(rows, pad_id, concatenated=True), DetachedContexts()
    inputs = layout.inputs(device, model.config._attn_implementation)
    with torch.no_grad(), scoring(model, layout.targets(device, 1.0)):  # without targets the head computes nothing
        model(**inputs, detach_into=detached)
    return detached
