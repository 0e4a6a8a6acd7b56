"""Attention for rows in which several suffixes share a trunk, as an implementation of transformers'.

A row is trunk | suffix_1 | … | suffix_G. The trunk attends causally to itself; each suffix to the trunk's
keys and values and causally to itself. Both parts are ordinary attention, so no scores are computed that
a mask would throw away, and the trunk's keys and values receive the sum of the suffixes' gradients.

Models take it through their ``attn_implementation``; without a layout it is plain SDPA, so decoding and
every other use of the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "rpo_shared_prefix"


@dataclass(frozen=True)
class Span:
    """One row within the concatenation of a micro-batch's rows.

    Attributes:
        start: Its first token.
        trunk_length: Tokens of the trunk.
        stop: One past its last token.
        index_GS: Positions of the suffixes' tokens relative to the trunk's end, padded with a token of
            their own; ``None`` for a row without branches.
        valid_GS: True where that is no padding.
        mask: Which keys (trunk, then own suffix) each of a suffix's tokens sees.
    """

    start: int
    trunk_length: int
    stop: int
    index_GS: Tensor | None = None
    valid_GS: Tensor | None = None
    mask: Any = None

    @classmethod
    def of(cls, start: int, trunk_length: int, suffix_lengths: Sequence[int], device: torch.device) -> Span:
        """Describe a row; with a single suffix it has no branches."""
        stop = start + trunk_length + sum(suffix_lengths)
        if len(suffix_lengths) == 1:
            return cls(start, stop - start, stop)
        longest = max(suffix_lengths)
        length_G = torch.tensor(suffix_lengths)
        valid_GS = torch.arange(longest)[None] < length_G[:, None]
        offset_G = length_G.cumsum(0) - length_G
        index_GS = torch.where(valid_GS, offset_G[:, None] + torch.arange(longest)[None], offset_G[:, None])
        shape = (longest, trunk_length + longest)
        mask: Any = causal_lower_right(*shape)
        if device.type == "cpu":
            mask = torch.ones(shape, dtype=torch.bool).tril(diagonal=trunk_length)
        return cls(start, trunk_length, stop, index_GS.to(device), valid_GS.to(device), mask)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_spans: Sequence[Span] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over concatenated rows ([1, heads, tokens, size]); plain SDPA where no spans are given."""
    if shared_spans is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    pieces = []
    for span in shared_spans:
        q, k, v = (x[:, :, span.start : span.stop] for x in (query, key, value))
        trunk_q, trunk_k, trunk_v = (x[:, :, : span.trunk_length] for x in (q, k, v))
        grouped = query.shape[1] != key.shape[1]
        pieces.append(
            scaled_dot_product_attention(trunk_q, trunk_k, trunk_v, is_causal=True, scale=scaling, enable_gqa=grouped)
        )
        if span.index_GS is not None:
            pieces.append(_suffixes(q, k, v, span, scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _suffixes(q: Tensor, k: Tensor, v: Tensor, span: Span, scaling: float | None) -> Tensor:
    """Attention of all suffixes of a row, [1, heads, suffix tokens, size]."""
    trunk = span.trunk_length
    own_q, own_k, own_v = (x[0, :, trunk:][:, span.index_GS].transpose(0, 1) for x in (q, k, v))
    members = own_q.shape[0]
    keys, values = (
        torch.cat([x[:, :, :trunk].expand(members, -1, -1, -1), own], dim=2) for x, own in ((k, own_k), (v, own_v))
    )
    repeats = own_q.shape[1] // keys.shape[1]
    if repeats > 1:  # kernels that take a mask want as many heads of keys as of queries
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
    output = scaled_dot_product_attention(own_q, keys, values, attn_mask=span.mask, scale=scaling)
    return output.transpose(0, 1)[:, span.valid_GS][None]


AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
