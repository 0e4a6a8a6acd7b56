"""Attention for rows in which several suffixes share a trunk, as an implementation of transformers'.

A row is trunk | suffix_1 | … | suffix_G. The trunk attends causally to itself; each suffix to the trunk's
keys and values and causally to itself. Both parts are ordinary attention, so no scores are computed that
a mask would throw away, and the trunk's keys and values receive the sum of the suffixes' gradients.

A row may also continue a *frozen* trunk, whose keys and values come from an earlier pass without gradient
and which is not computed again: less work, and a biased gradient.

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

from rpo_lightning.suffix_attention import SuffixAttention

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
    def of(
        cls,
        start: int,
        trunk_length: int,
        suffix_lengths: Sequence[int],
        device: torch.device,
        frozen: tuple[int, int] = (0, 0),
    ) -> Span:
        """Describe a row; with a single suffix, or none, it has no branches."""
        stop = start + trunk_length + sum(suffix_lengths)
        before = frozen[1] - frozen[0]
        if len(suffix_lengths) <= 1:
            trunk_length = stop - start
        trunk_mask = _causal(trunk_length, before + trunk_length, device) if before else None
        if len(suffix_lengths) <= 1:
            return cls(start, trunk_length, stop, frozen, trunk_mask=trunk_mask)
        longest = max(suffix_lengths)
        length_G = torch.tensor(suffix_lengths)
        valid_GS = torch.arange(longest)[None] < length_G[:, None]
        offset_G = length_G.cumsum(0) - length_G
        index_GS = torch.where(valid_GS, offset_G[:, None] + torch.arange(longest)[None], offset_G[:, None])
        mask = None if device.type == "cpu" else _causal(longest, before + trunk_length + longest, device)
        return cls(
            start, trunk_length, stop, frozen, index_GS.to(device), valid_GS.to(device), trunk_mask, mask
        )  # fmt: skip


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
    shared_spans: Sequence[Span] | None = None,
    frozen_trunks: FrozenTrunks | None = None,
    freeze_into: FrozenTrunks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over concatenated rows ([1, heads, tokens, size]); plain SDPA where no spans are given.

    Args:
        module: The attention layer.
        query: Queries.
        key: Keys, of as many heads or fewer.
        value: Values, like the keys.
        attention_mask: For plain SDPA.
        scaling: Factor of the scores.
        dropout: For plain SDPA.
        shared_spans: The rows.
        frozen_trunks: Keys and values that the spans' ``frozen`` refer to.
        freeze_into: Takes the keys and values of this pass.
        **kwargs: What else transformers hands on.
    """
    if shared_spans is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    query, key, value = _same_dtype(query, key, value)
    if freeze_into is not None:
        freeze_into[int(module.layer_idx)] = (key.detach(), value.detach())  # type: ignore[arg-type]
    pieces = []
    for span in shared_spans:
        q, k, v = (x[:, :, span.start : span.stop] for x in (query, key, value))
        if frozen_trunks is not None:
            frozen = frozen_trunks[int(module.layer_idx)]  # type: ignore[arg-type]
            k, v = (
                torch.cat([x[:, :, slice(*span.frozen)], own], dim=2) for x, own in zip(frozen, (k, v), strict=True)
            )
        queries, keys = span.trunk_length, k.shape[2] - (q.shape[2] - span.trunk_length)
        pieces.append(_trunk(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], span, scaling))
        if span.index_GS is not None:
            own = (q[:, :, queries:], k[:, :, keys:], v[:, :, keys:])
            pieces.append(_suffixes(own, k[:, :, :keys], v[:, :, :keys], span, scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
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
