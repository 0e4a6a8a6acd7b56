"""Attention for rows in which several suffixes share a context, as an attention implementation for transformers.

A row is a context and suffix_1 … suffix_G. The context attends causally to itself. Each suffix attends to the context
and causally to itself. Both parts are ordinary attention: no score is computed and then masked, and the context's keys
and values get the sum of the suffixes' gradients.

Three kernels do the work. On a GPU in 16 bits ``gpu.py`` computes all rows at once. Elsewhere rows are computed one by
one: on a CPU by ``cpu.py``, on a GPU in fp32 by masked SDPA with a copy of the context for each suffix.

A row may also continue a *detached* context: its keys and values come from an earlier pass. Either that pass had no
gradient, which is less work and biased, or it gets its gradient afterwards (``held_context.py``).

A model uses this through its ``attn_implementation``. Without a layout it is plain SDPA; decoding and other uses of the
model do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rpo_lightning.policy.prefix_sharing.arrangement import Arrangement
from rpo_lightning.policy.prefix_sharing.cpu import SuffixAttention
from rpo_lightning.policy.prefix_sharing.gpu import PackedRows, packed_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import takes
from rpo_lightning.policy.prefix_sharing.transfer import sent_together

IMPLEMENTATION = "rpo_shared_prefix"


class DetachedContexts(dict[int, tuple[Tensor, Tensor]]):
    """Keys and values of concatenated contexts, [1, heads, tokens, size] each, by index of the layer."""


@dataclass(frozen=True)
class RowLayout:
    """One row among the concatenated rows of a micro-batch, for kernels that take one row at a time.

    Attributes:
        context: Where its context is; the whole row if it has no branches.
        suffixes: Where its suffixes are; empty without branches.
        detached: Where its detached tokens are among those of all rows.
        index_GS: Positions of the suffixes' tokens, counted from the first suffix. Padding repeats the suffix's first
            token. ``None`` without branches.
        valid_N: Indices of the suffixes' tokens among the G · S padded ones; ``None`` where nothing is padded.
        context_mask: Which keys each context token sees; ``None`` if nothing is detached and the mask is causal.
        mask: Which keys (context, then own suffix) each suffix token sees; ``None`` on a CPU, which needs no mask.
    """

    context: slice
    suffixes: slice
    detached: slice
    index_GS: Tensor | None = None
    valid_N: Tensor | None = None
    context_mask: Any = None
    mask: Any = None

    @classmethod
    def of(cls, arrangement: Arrangement, row: int, device: torch.device) -> RowLayout:
        """Describe a row. With one suffix or none it has no branches."""
        shape, start = arrangement.shapes[row], arrangement.context_starts[row]
        length = shape.trunk
        context, first = slice(start, start + length), arrangement.detached_starts[row]
        detached = slice(first, first + shape.detached)
        context_mask = _causal(length, shape.detached + length, device) if shape.detached else None
        if not shape.branches:
            return cls(context, slice(0, 0), detached, context_mask=context_mask)
        length_G = np.array(shape.suffixes)
        longest, offset_G = int(length_G.max()), length_G.cumsum() - length_G
        valid_GS = np.arange(longest)[None] < length_G[:, None]
        index_GS = np.where(valid_GS, offset_G[:, None] + np.arange(longest)[None], offset_G[:, None])
        on_host = [torch.from_numpy(x) for x in (index_GS, valid_GS.ravel().nonzero()[0])]
        on_device = sent_together(on_host, device)
        suffixes = slice(arrangement.suffix_starts[row], arrangement.suffix_starts[row] + sum(shape.suffixes))
        mask = None if device.type == "cpu" else _causal(longest, shape.detached + length + longest, device)
        valid_N = None if valid_GS.all() else on_device[1]
        return cls(context, suffixes, detached, on_device[0], valid_N, context_mask, mask)


class SharedLayout:
    """Positions of a micro-batch's rows, in the form that each kernel needs.

    Args:
        arrangement: Where the rows are.
        device: Where the model is.
    """

    def __init__(self, arrangement: Arrangement, device: torch.device) -> None:
        self._arrangement = arrangement
        self._device = device

    @cached_property
    def packed(self) -> PackedRows:
        """All rows at once, for ``gpu.py``."""
        return PackedRows.of(self._arrangement, self._device)

    @cached_property
    def rows(self) -> list[RowLayout]:
        """Row by row, as they are laid out, for the other kernels."""
        return [RowLayout.of(self._arrangement, row, self._device) for row in self._arrangement.order]


def _causal(queries: int, keys: int, device: torch.device) -> Any:
    """Causal mask aligned at the end: the last query sees all keys, the one before it all but the last, and so on."""
    if device.type == "cpu":
        return torch.ones((queries, keys), dtype=torch.bool).tril(diagonal=keys - queries)
    return causal_lower_right(queries, keys)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_layout: SharedLayout | None = None,
    detached_contexts: DetachedContexts | None = None,
    store_into: DetachedContexts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of concatenated rows; plain SDPA without a layout.

    Args:
        module: The attention layer.
        query: Queries, [1, heads, tokens, size].
        key: Keys, [1, key heads, tokens, size]; key heads divide the heads.
        value: Values, shaped like the keys.
        attention_mask: For plain SDPA only.
        scaling: Factor of the scores.
        dropout: For plain SDPA only.
        shared_layout: Positions of the rows.
        detached_contexts: Keys and values of the detached tokens.
        store_into: Filled with the keys and values of this pass.
        **kwargs: Other arguments of transformers' attention functions.

    Returns:
        Output, [1, tokens, heads, size], and no attention weights.
    """
    if shared_layout is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    query, key, value = same_dtype(query, key, value)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if store_into is not None:
        store_into.setdefault(layer, (key, value))  # a checkpointed layer is computed again in the backward pass
    detached = None if detached_contexts is None else detached_contexts[layer]
    if takes(query, key, value):
        return packed_attention(query, key, value, shared_layout.packed, scaling, detached), None
    outputs = [_row(query, key, value, row, scaling, detached) for row in shared_layout.rows]
    parts = [x for x, _ in outputs] + [x for _, x in outputs if x is not None]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowLayout,
    scaling: float | None,
    detached: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of one row: of its context, and of its suffixes if it has several."""
    k, v = key[:, :, row.context], value[:, :, row.context]
    if detached is not None:
        k, v = (torch.cat([x[:, :, row.detached], own], dim=2) for x, own in zip(detached, (k, v), strict=True))
    of_context = _context(query[:, :, row.context], k, v, row, scaling)
    if row.index_GS is None:
        return of_context, None
    own = (query[:, :, row.suffixes], key[:, :, row.suffixes], value[:, :, row.suffixes])
    return of_context, _suffixes(own, k, v, row, scaling)


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast queries, keys and values to one dtype, which kernels need: under autocast rotary embeddings return fp32."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return tuple(x.to(dtype) for x in tensors)


def _context(q: Tensor, k: Tensor, v: Tensor, row: RowLayout, scaling: float | None) -> Tensor:
    """Attention of a context to itself and to its detached part."""
    if row.context_mask is None:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    k, v = _repeated(q, k, v)
    return scaled_dot_product_attention(q, k, v, attn_mask=row.context_mask, scale=scaling)


def _suffixes(
    own: tuple[Tensor, Tensor, Tensor], context_k: Tensor, context_v: Tensor, row: RowLayout, scaling: float | None
) -> Tensor:
    """Attention of all suffixes of a row, [1, heads, suffix tokens, size]."""
    own_q, own_k, own_v = (x[0][:, row.index_GS].transpose(0, 1) for x in own)
    if own_q.device.type == "cpu":
        output = SuffixAttention.apply(own_q, own_k, own_v, context_k, context_v, scaling)
    else:
        members = own_q.shape[0]
        keys, values = (
            torch.cat([context.expand(members, -1, -1, -1), x], dim=2)
            for context, x in ((context_k, own_k), (context_v, own_v))
        )
        keys, values = _repeated(own_q, keys, values)
        output = scaled_dot_product_attention(own_q, keys, values, attn_mask=row.mask, scale=scaling)
    output = output.transpose(0, 1).flatten(1, 2)
    return (output if row.valid_N is None else output[:, row.valid_N])[None]


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated to as many heads as the queries have, as kernels with a mask need them."""
    repeats = q.shape[1] // k.shape[1]
    return (k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)) if repeats > 1 else (k, v)


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
