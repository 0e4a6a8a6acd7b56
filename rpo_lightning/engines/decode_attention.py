"""Attention of one new token per sequence, without a copy of keys and values for every query head.

transformers' SDPA copies keys and values until there are as many as query heads whenever there is a mask, at
every step and in every layer: with long sequences that is most of decoding. The query heads that share a head of
keys see the same tokens, so that they can be computed as that many queries of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rpo_lightning.shared_attention import IMPLEMENTATION as SHARED

IMPLEMENTATION = "rpo_decoding"


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as an implementation of transformers', [sequences, queries, heads, size].

    Args:
        module: The attention layer.
        query: Queries, [sequences, heads, queries, size].
        key: Keys, of as many heads or fewer.
        value: Values, like the keys.
        attention_mask: Which keys the queries see.
        scaling: Factor of the scores.
        **kwargs: What else transformers hands on.
    """
    if query.shape[2] > 1 or query.shape[1] == key.shape[1] or kwargs.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.flatten(1, 2)[:, None], None


@contextmanager
def decoding_attention(policy: PreTrainedModel) -> Iterator[None]:
    """Have a model that computes with SDPA, or with ours, decode with :func:`decode_attention`."""
    before = policy.config._attn_implementation
    if before not in ("sdpa", SHARED):
        yield
        return
    policy.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        policy.set_attn_implementation(before)


AttentionInterface.register(IMPLEMENTATION, decode_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
