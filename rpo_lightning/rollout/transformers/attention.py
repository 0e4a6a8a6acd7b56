"""Attention of one new token per sequence, without copies of keys and values.

transformers' SDPA copies keys and values until there are as many as query heads whenever there is a mask, at
every step and in every layer: with long sequences that is most of decoding. The query heads that share a head of
keys see the same tokens, so that they can be computed as that many queries of one head.

So can the sequences that continue one prompt and prefix, their *context*: it is read once for all of them, each
reads its own tokens, and the two parts are merged by their log-sum-exps, as in training (``suffix_attention``).
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
    """Contexts of the requests whose sequences are decoded.

    Attributes:
        layers: Keys and values of each layer, [R, heads, T, size].
        mask_R11T: What is added to the scores: minus infinity where a context is padded.
        members: Sequences of a request at most.
        slot_N: Place of each sequence among R times ``members``; ``None`` if every place is taken.
    """

    layers: list[tuple[Tensor, ...]]
    mask_R11T: Tensor
    members: int
    slot_N: Tensor | None

    def attention(self, layer: int, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention of sequences to their contexts.

        Args:
            layer: Index of the layer.
            query: Queries, [N, heads of keys, queries of each, size].
            scale: Factor of the scores.

        Returns:
            Output like the queries, and log-sum-exps of the scores.
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
    """Attention as an implementation of transformers', [sequences, queries, heads, size].

    Args:
        module: The attention layer.
        query: Queries, [sequences, heads, queries, size].
        key: Keys, of as many heads or fewer.
        value: Values, like the keys.
        attention_mask: Which keys the queries see; not asked where there are contexts.
        scaling: Factor of the scores.
        shared_contexts: What comes before the keys.
        **kwargs: What else transformers hands on.
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
    """Attention of all queries to all keys that the mask does not hide, and log-sum-exps of the scores.

    Args:
        query: Queries, [rows, heads, queries, size].
        key: Keys, of as many heads.
        value: Values, like the keys.
        scale: Factor of the scores; 1/√size if not given.
        mask: What is added to the scores.
    """
    if query.device.type == "cpu":
        mask = None if mask is None else mask.to(query.dtype)
        output, lse = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return output, lse
    return attended_by_products(query, key, value, scale, mask)


def attended_by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`attended` where no kernel at hand gives log-sum-exps; scores of one token a sequence are few."""
    scores = _products(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Of all queries and keys, in fp32: the products of 16-bit numbers are not rounded to 16 bits on the way.

    Keys of a large mean make large scores, of which the softmax sees the differences. torch's CPU has no such product.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return products.unflatten(0, query.shape[:2])
    return (query @ key.mT).float()


@contextmanager
def decoding_attention(policy: PreTrainedModel) -> Iterator[bool]:
    """Have a model that computes with SDPA, or with ours, decode with :func:`decode_attention`.

    Yields:
        Whether sequences may share a context: the model has been shown to keep members of a shared row apart.
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
