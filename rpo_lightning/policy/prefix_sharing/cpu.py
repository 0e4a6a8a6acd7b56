"""Attention of several suffixes to one context and to themselves on a CPU, without copies of the context.

One kernel call computes attention of all suffixes to the context, another attention of each suffix to itself. The two
are merged by their log-sum-exps, which is exact. The backward pass is exact too: from the merged output and log-sum-exp
each kernel computes its share of the gradient of the whole softmax.

The kernels are torch's flash attention for CPUs, which supports grouped heads. ``gpu.py`` does the same on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SuffixAttention(torch.autograd.Function):
    """Causal attention of suffixes [G, heads, S, size] that follow one context [1, heads, T, size]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, scale: float | None
    ) -> Tensor:
        """Output [G, heads, S, size].

        Args:
            ctx: Holds tensors for the backward pass.
            q: Queries of the suffixes.
            k: Keys of the suffixes; their number of heads divides that of the queries.
            v: Values of the suffixes.
            context_k: Keys of the context.
            context_v: Values of the context.
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
        """Gradients of queries, keys and values. Those of the context are sums over the suffixes."""
        q, k, v, context_k, context_v, output, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        q_of_context, k_grad, v_grad = _backward(
            _together(gradient), _together(q), context_k, context_v, _together(output), _together(lse), 0.0, False,
            scale=ctx.scale,
        )  # fmt: skip
        q_own, own_k_grad, own_v_grad = _backward(gradient, q, k, v, output, lse, 0.0, True, scale=ctx.scale)
        return _apart(q_of_context, len(q)) + q_own, own_k_grad, own_v_grad, k_grad, v_grad, None


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention of the same queries to two sets of keys into attention to both.

    Args:
        first: Output for the first set, [..., size].
        first_lse: Log-sum-exps of the scores of the first set, [...].
        second: Output for the second set, [..., size].
        second_lse: Log-sum-exps of the scores of the second set, [...].

    Returns:
        Output [..., size] and log-sum-exps [...].
    """
    lse = torch.logaddexp(first_lse, second_lse)
    output = first * torch.exp(first_lse - lse)[..., None] + second * torch.exp(second_lse - lse)[..., None]
    return output.to(first.dtype), lse


def _together(x: Tensor) -> Tensor:
    """Reshape [G, heads, S, …] to [1, heads, G·S, …]."""
    return x.transpose(0, 1).flatten(1, 2)[None].contiguous()


def _apart(x: Tensor, members: int) -> Tensor:
    """The inverse of ``_together``."""
    return x[0].unflatten(1, (members, -1)).transpose(0, 1)
