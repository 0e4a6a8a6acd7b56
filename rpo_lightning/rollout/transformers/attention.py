"""Attention for decoding one token per sequence, without copies of keys and values.

With a mask, transformers' SDPA repeats keys and values to the number of query heads, at every step and in every layer.
With long sequences that is most of decoding. Query heads that share a key head see the same tokens; here they are
computed as several queries of one head.

Sequences that share a context are computed the same way: the context is read once for all of them. Each sequence also
reads its own tokens. The two parts are merged by their log-sum-exps, as in ``policy/prefix_sharing/cpu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION as SHARED
from rpo_lightning.policy.prefix_sharing.attention import same_dtype
from rpo_lightning.policy.prefix_sharing.cpu import merge

IMPLEMENTATION = "rpo_decoding"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class SharedContexts:
    """Contexts of the requests, and the place of each decoded sequence among them.

    Attributes:
        layers: Keys and values of each layer, [R, heads, T, size] each.
        mask_R11T: Added to the scores: minus infinity where a context is padded, 0 elsewhere.
        members: Largest number of sequences of a request.
        slot_N: Place of each sequence among ``R * members`` places; ``None`` if every place is taken.
    """

    layers: list[tuple[Tensor, ...]]
    mask_R11T: Tensor
    members: int
    slot_N: Tensor | None

    def attention(self, layer: int, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention of sequences to their contexts.

        Args:
            layer: Index of the layer.
            query: Queries, [N, key heads, queries of a key head, size].
            scale: Factor of the scores.

        Returns:
            Output, shaped like the queries, and log-sum-exps of the scores, [N, key heads, queries of a key head].
        """
        key, value = self.layers[layer]
        slots = query
        if self.slot_N is not None:
            slots = query.new_zeros(len(key) * self.members, *query.shape[1:])
            slots[self.slot_N] = query
        slots = slots.unflatten(0, (len(key), -1)).transpose(1, 2).flatten(2, 3)
        of_slots = attended(slots, key, value, scale, self.mask_R11T)
        output, lse = (x.unflatten(2, (self.members, -1)).transpose(1, 2).flatten(0, 1) for x in of_slots)
        return (output, lse) if self.slot_N is None else (output[self.slot_N], lse[self.slot_N])


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_contexts: SharedContexts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens, as an attention implementation for transformers.

    Args:
        module: The attention layer.
        query: Queries, [sequences, heads, queries, size].
        key: Keys, [sequences, key heads, tokens, size]; key heads divide the heads.
        value: Values, shaped like the keys.
        attention_mask: Which keys the queries see; ignored with ``shared_contexts``.
        scaling: Factor of the scores.
        shared_contexts: Contexts that precede the keys.
        **kwargs: Other arguments of transformers' attention functions.

    Returns:
        Output, [sequences, queries, heads, size], and no attention weights.
    """
    if shared_contexts is not None:
        query, key, value = same_dtype(query, key, value)
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        of_context = shared_contexts.attention(int(module.layer_idx), grouped, scaling)  # type: ignore[arg-type]
        output, _ = merge(*of_context, *attended(grouped, key, value, scaling))
        return output.flatten(1, 2)[:, None], None
    mask_of_each_head = attention_mask is not None and attention_mask.shape[1] > 1
    if (
        query.shape[2] > 1
        or query.shape[1] == key.shape[1]
        or mask_of_each_head
        or kwargs.get("position_bias") is not None
    ):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.flatten(1, 2)[:, None], None


def attended(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention without causal order.

    Args:
        query: Queries, [rows, heads, queries, size].
        key: Keys, [rows, heads, keys, size].
        value: Values, shaped like the keys.
        scale: Factor of the scores; 1/√size if not given.
        mask: Added to the scores.

    Returns:
        Output, shaped like the queries, and log-sum-exps of the scores, [rows, heads, queries].
    """
    if query.device.type == "cpu":
        mask = None if mask is None else mask.to(query.dtype)
        output, lse = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return output, lse
    return attended_by_products(query, key, value, scale, mask)


def attended_by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attended`` by matrix products, for devices without a kernel that returns log-sum-exps.

    It holds all scores; with one token a sequence these are few.
    """
    scores = _products(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Products of all queries with all keys, in fp32; on a GPU those of 16-bit numbers are not rounded to 16 bits.

    Keys with a large mean make large scores, and the softmax depends on their differences. torch has no such product on
    a CPU.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return products.unflatten(0, query.shape[:2])
    return (query @ key.mT).float()


@contextmanager
def decoding_attention(policy: PreTrainedModel) -> Iterator[bool]:
    """Within this context a model decodes with ``decode_attention``, if it used SDPA or shared rows before.

    Yields:
        Whether sequences may share a context: True for a model that passed the trial of shared rows.
    """
    before = policy.config._attn_implementation
    if before not in ("sdpa", SHARED):
        yield False
        return
    policy.set_attn_implementation(IMPLEMENTATION)
    try:
        yield before == SHARED
    finally:
        policy.set_attn_implementation(before)


AttentionInterface.register(IMPLEMENTATION, decode_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
