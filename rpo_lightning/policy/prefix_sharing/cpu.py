"""Attention of several suffixes to one context and to themselves, without a copy of the context for each.

Attention to the context is computed for all suffixes at once, attention of each to itself separately, and the two
are merged by their log-sum-exps, which is exact. So is the backward pass: given the merged output and
log-sum-exp, each part's kernel computes its share of the gradient of the whole softmax.

The CPU's flash kernels do that, grouped heads included; ``packed_attention`` is the same on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SuffixAttention(torch.autograd.Function):
    """Causal attention of suffixes [G, heads, S, size] that all follow one context [1, heads, T, size]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, scale: float | None
    ) -> Tensor:
        """Output [G, heads, S, size].

        Args:
            ctx: What the backward pass needs.
            q: Queries of the suffixes.
            k: Their keys, of as many heads or a divisor of them.
            v: Their values.
            context_k: Keys of the context.
            context_v: Its values.
            scale: Factor of the scores; 1/√size if not given.
        """
        of_context, lse_of_context = _forward(_together(q), context_k, context_v, 0.0, False, scale=scale)
        own, lse_of_own = _forward(q, k, v, 0.0, True, scale=scale)
        output, lse = merge(_apart(of_context, len(q)), _apart(lse_of_context, len(q)), own, lse_of_own)
        ctx.save_for_backward(q, k, v, context_k, context_v, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values; the context's are summed over the suffixes."""
        q, k, v, context_k, context_v, output, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        q_of_context, k_grad, v_grad = _backward(
            _together(gradient), _together(q), context_k, context_v, _together(output), _together(lse), 0.0, False,
            scale=ctx.scale,
        )  # fmt: skip
        q_own, own_k_grad, own_v_grad = _backward(gradient, q, k, v, output, lse, 0.0, True, scale=ctx.scale)
        return _apart(q_of_context, len(q)) + q_own, own_k_grad, own_v_grad, k_grad, v_grad, None


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries to two sets of keys from attention to each.

    Args:
        first: Output of the first, [..., size].
        first_lse: Log-sum-exps of its scores, [...].
        second: Output of the second.
        second_lse: Its log-sum-exps.

    Returns:
        Output and log-sum-exps.
    """
    lse = torch.logaddexp(first_lse, second_lse)
    output = first * torch.exp(first_lse - lse)[..., None] + second * torch.exp(second_lse - lse)[..., None]
    return output.to(first.dtype), lse


def _together(x: Tensor) -> Tensor:
    """[G, heads, S, …] as [1, heads, G·S, …]."""
    return x.transpose(0, 1).flatten(1, 2)[None].contiguous()


def _apart(x: Tensor, members: int) -> Tensor:
    """The inverse of :func:`_together`."""
    return x[0].unflatten(1, (members, -1)).transpose(0, 1)
