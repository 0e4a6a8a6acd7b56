"""Attention for rows in which several suffixes share a trunk, as an implementation of transformers'.

A row is trunk | suffix_1 | … | suffix_G. The trunk attends causally to itself; each suffix to the trunk's
keys and values and causally to itself. Both parts are ordinary attention, so no scores are computed that
a mask would throw away, and the trunk's keys and values receive the sum of the suffixes' gradients.

On a GPU in 16 bits ``packed_attention`` takes all rows at once. Elsewhere they are taken one by one: on a CPU
by ``suffix_attention``, on a GPU in fp32 by masked SDPA with a copy of the trunk for each suffix.

A row may also continue a *frozen* trunk, whose keys and values come from an earlier pass without gradient
and which is not computed again: less work, and a biased gradient.

Models take it through their ``attn_implementation``; without a layout it is plain SDPA, so decoding and
every other use of the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rpo_lightning.policy.prefix_sharing.cpu import SuffixAttention
from rpo_lightning.policy.prefix_sharing.gpu import PackedRows, packed_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import takes
from rpo_lightning.policy.prefix_sharing.rows import RowShape

IMPLEMENTATION = "rpo_shared_prefix"


class FrozenTrunks(dict[int, tuple[Tensor, Tensor]]):
    """Keys and values of concatenated trunks, [1, heads, tokens, size], by the index of their layer."""


@dataclass(frozen=True)
class Span:
    """One row within the concatenation of a micro-batch's rows.

    Attributes:
        start: Its first token.
        trunk_length: Tokens of the trunk that are computed.
        frozen: Where the frozen part of its trunk, which comes before, begins and ends among the frozen trunks.
        stop: One past its last token.
        index_GS: Positions of the suffixes' tokens relative to the trunk's end, padded with a token of
            their own; ``None`` for a row without branches.
        valid_GS: True where that is no padding.
        trunk_mask: Which keys each of the trunk's tokens sees; ``None`` if it is causal without a frozen part.
        mask: Which keys (trunk, then own suffix) each of a suffix's tokens sees; not needed on the CPU.
    """

    start: int
    trunk_length: int
    stop: int
    frozen: tuple[int, int] = (0, 0)
    index_GS: Tensor | None = None
    valid_GS: Tensor | None = None
    trunk_mask: Any = None
    mask: Any = None

    @classmethod
    def of(cls, start: int, shape: RowShape, frozen_start: int, device: torch.device) -> Span:
        """Describe a row; with a single suffix, or none, it has no branches."""
        stop, frozen = start + len(shape), (frozen_start, frozen_start + shape.frozen)
        trunk_length = shape.trunk if shape.branches else len(shape)
        trunk_mask = _causal(trunk_length, shape.frozen + trunk_length, device) if shape.frozen else None
        if not shape.branches:
            return cls(start, trunk_length, stop, frozen, trunk_mask=trunk_mask)
        longest = max(shape.suffixes)
        length_G = torch.tensor(shape.suffixes)
        valid_GS = torch.arange(longest)[None] < length_G[:, None]
        offset_G = length_G.cumsum(0) - length_G
        index_GS = torch.where(valid_GS, offset_G[:, None] + torch.arange(longest)[None], offset_G[:, None])
        mask = None if device.type == "cpu" else _causal(longest, shape.frozen + trunk_length + longest, device)
        return cls(
            start, trunk_length, stop, frozen, index_GS.to(device), valid_GS.to(device), trunk_mask, mask
        )  # fmt: skip


class SharedLayout:
    """Where the rows of a micro-batch are, described for whichever kernels ask.

    Args:
        shapes: Its rows, in the order in which they are concatenated.
        device: Where the model is.
    """

    def __init__(self, shapes: Sequence[RowShape], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device

    @cached_property
    def packed(self) -> PackedRows:
        """All rows at once."""
        return PackedRows.of(self._shapes, self._device)

    @cached_property
    def spans(self) -> list[Span]:
        """Row by row."""
        spans, start, frozen = [], 0, 0
        for shape in self._shapes:
            spans.append(Span.of(start, shape, frozen, self._device))
            start, frozen = start + len(shape), frozen + shape.frozen
        return spans


def _causal(queries: int, keys: int, device: torch.device) -> Any:
    """Mask with which the last query sees all keys, the one before all but one, and so on."""
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
    frozen_trunks: FrozenTrunks | None = None,
    freeze_into: FrozenTrunks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over concatenated rows ([1, heads, tokens, size]); plain SDPA where no layout is given.

    Args:
        module: The attention layer.
        query: Queries.
        key: Keys, of as many heads or fewer.
        value: Values, like the keys.
        attention_mask: For plain SDPA.
        scaling: Factor of the scores.
        dropout: For plain SDPA.
        shared_layout: Where the rows are.
        frozen_trunks: Keys and values of the frozen parts of their trunks.
        freeze_into: Takes the keys and values of this pass.
        **kwargs: What else transformers hands on.
    """
    if shared_layout is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    query, key, value = same_dtype(query, key, value)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if freeze_into is not None:
        freeze_into[layer] = (key.detach(), value.detach())
    frozen = None if frozen_trunks is None else frozen_trunks[layer]
    if takes(query, key, value):
        return packed_attention(query, key, value, shared_layout.packed, scaling, frozen), None
    pieces = [piece for span in shared_layout.spans for piece in _row(query, key, value, span, scaling, frozen)]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _row(
    query: Tensor, key: Tensor, value: Tensor, span: Span, scaling: float | None, frozen: tuple[Tensor, Tensor] | None
) -> list[Tensor]:
    """Attention of one row: of its trunk, and of its suffixes where it has several."""
    q, k, v = (x[:, :, span.start : span.stop] for x in (query, key, value))
    if frozen is not None:
        k, v = (torch.cat([x[:, :, slice(*span.frozen)], own], dim=2) for x, own in zip(frozen, (k, v), strict=True))
    queries, keys = span.trunk_length, k.shape[2] - (q.shape[2] - span.trunk_length)
    of_trunk = _trunk(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], span, scaling)
    if span.index_GS is None:
        return [of_trunk]
    own = (q[:, :, queries:], k[:, :, keys:], v[:, :, keys:])
    return [of_trunk, _suffixes(own, k[:, :, :keys], v[:, :, :keys], span, scaling)]


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast rotary embeddings leave queries and keys in fp32; kernels want one dtype."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return tuple(x.to(dtype) for x in tensors)


def _trunk(q: Tensor, k: Tensor, v: Tensor, span: Span, scaling: float | None) -> Tensor:
    """Attention of a trunk to itself and to what is frozen before it."""
    if span.trunk_mask is None:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    k, v = _repeated(q, k, v)
    return scaled_dot_product_attention(q, k, v, attn_mask=span.trunk_mask, scale=scaling)


def _suffixes(
    own: tuple[Tensor, Tensor, Tensor], trunk_k: Tensor, trunk_v: Tensor, span: Span, scaling: float | None
) -> Tensor:
    """Attention of all suffixes of a row, [1, heads, suffix tokens, size]."""
    own_q, own_k, own_v = (x[0][:, span.index_GS].transpose(0, 1) for x in own)
    if own_q.device.type == "cpu":
        output = SuffixAttention.apply(own_q, own_k, own_v, trunk_k, trunk_v, scaling)
    else:
        members = own_q.shape[0]
        keys, values = (
            torch.cat([trunk.expand(members, -1, -1, -1), x], dim=2)
            for trunk, x in ((trunk_k, own_k), (trunk_v, own_v))
        )
        keys, values = _repeated(own_q, keys, values)
        output = scaled_dot_product_attention(own_q, keys, values, attn_mask=span.mask, scale=scaling)
    return output.transpose(0, 1)[:, span.valid_GS][None]


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries: what kernels that take a mask want."""
    repeats = q.shape[1] // k.shape[1]
    return (k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)) if repeats > 1 else (k, v)


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
