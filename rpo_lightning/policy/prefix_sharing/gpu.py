"""Attention of concatenated rows on a GPU in 16 bits, by flash attention's kernels for sequences of any length.

Two kernel calls a layer serve a whole micro-batch with any number of rows and suffixes. In the first, every context and
every suffix attends causally to itself. In the second, the suffixes of each row attend to their context. The two
outputs of a suffix are merged by their log-sum-exps, as in ``cpu.py``. Nothing is padded, no context is copied for its
suffixes, and no score is computed and then masked.

The kernels are torch's, called by names that are not public. ``gpu_check.py`` tries them before their first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rpo_lightning.policy.prefix_sharing.cpu import merge
from rpo_lightning.policy.prefix_sharing.rows import RowShape


@dataclass(frozen=True)
class Sequences:
    """Sequences for one kernel call: the queries of each attend to the keys of the same sequence.

    Attributes:
        query_index: Indices of the queries among the computed tokens; ``None`` for all of them.
        key_index: Indices of the keys among the detached tokens followed by the computed ones; ``None`` for all.
        query_bounds: Start of each sequence's queries, and the end of the last, [sequences + 1], int32.
        key_bounds: Start of each sequence's keys, and the end of the last, [sequences + 1], int32.
        most_queries: Largest number of queries of a sequence.
        most_keys: Largest number of keys of a sequence.
        causal: Whether the last query sees all keys, the one before it all but the last, and so on. If not, every
            query sees every key.
    """

    query_index: Tensor | None
    key_index: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int
    causal: bool

    @classmethod
    def of(
        cls,
        queries: Sequence[int],
        keys: Sequence[int],
        device: torch.device,
        query_index: Tensor | None = None,
        key_index: Tensor | None = None,
        causal: bool = False,
    ) -> Sequences:
        """Sequences with the given numbers of queries and keys; the other arguments are as in the attributes."""
        bounds = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys)
        ]
        indices = [None if index is None else index.to(device) for index in (query_index, key_index)]
        return cls(indices[0], indices[1], bounds[0], bounds[1], max(queries), max(keys), causal)


@dataclass(frozen=True)
class PackedRows:
    """The rows of a micro-batch as sequences.

    Attributes:
        own: Every context and every suffix with itself; a row with one suffix or none is one sequence.
        shared: All suffixes of a row with their context, for rows with several suffixes; ``None`` without such rows.
    """

    own: Sequences
    shared: Sequences | None

    @classmethod
    def of(cls, shapes: Sequence[RowShape], device: torch.device) -> PackedRows:
        """Describe rows that are concatenated in this order; their detached tokens are too."""
        detached_starts = [0, *accumulate(shape.detached for shape in shapes)]
        starts = [0, *accumulate(len(shape) for shape in shapes)]
        detached_tokens = detached_starts[-1]
        queries: list[int] = []
        keys: list[int] = []
        key_index: list[Tensor] = []
        suffixes: list[Tensor] = []
        contexts: list[Tensor] = []
        for shape, detached_start, start in zip(shapes, detached_starts, starts, strict=False):
            detached = torch.arange(detached_start, detached_start + shape.detached, device="cpu")
            computed = torch.arange(start, start + len(shape), device="cpu")
            parts = [shape.context, *shape.suffixes] if shape.branches else [len(shape)]
            queries += parts
            keys += [shape.detached + parts[0], *parts[1:]]
            key_index += [detached, detached_tokens + computed]
            if shape.branches:
                suffixes.append(computed[shape.context :])
                contexts.append(torch.cat([detached, detached_tokens + computed[: shape.context]]))
        own = Sequences.of(queries, keys, device, None, torch.cat(key_index) if detached_tokens else None, causal=True)
        if not suffixes:
            return cls(own, None)
        lengths = [len(x) for x in suffixes], [len(x) for x in contexts]
        return cls(own, Sequences.of(*lengths, device, torch.cat(suffixes), torch.cat(contexts)))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PackedRows,
    scale: float | None,
    detached: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of concatenated rows, [1, tokens, heads, size].

    Args:
        query: Queries, [1, heads, tokens, size].
        key: Keys, [1, key heads, tokens, size]; key heads divide the heads.
        value: Values, shaped like the keys.
        rows: Positions of the rows.
        scale: Factor of the scores; 1/√size if not given.
        detached: Keys and values of the detached tokens, [1, key heads, detached tokens, size] each.
    """
    if detached is not None:
        key, value = (torch.cat([before, own], dim=2) for before, own in zip(detached, (key, value), strict=True))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    output: Tensor = _PackedAttention.apply(query, key, value, rows, scale)
    return output[None]


class _PackedAttention(torch.autograd.Function):
    """Attention of queries [T, heads, size] to keys and values [T', heads, size]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float | None) -> Tensor:
        output, lse = _attend(q, k, v, rows.own, scale)
        if rows.shared is not None:
            index = rows.shared.query_index
            with_context, lse_with_context = _attend(q, k, v, rows.shared, scale)
            merged, merged_lse = merge(output[index], lse[:, index].T, with_context, lse_with_context.T)
            output[index], lse[:, index] = merged, merged_lse.T
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.rows, ctx.scale = rows, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients of both calls: from the merged output and log-sum-exp each gives its exact share."""
        q, k, v, output, lse = ctx.saved_tensors
        rows, gradient = ctx.rows, gradients[0].contiguous()
        q_grad, *own = _attend_backward(gradient, q, k, v, output, lse, rows.own, ctx.scale)
        k_grad, v_grad = (_placed(x, k, rows.own.key_index) for x in own)
        if rows.shared is not None:
            of_queries, *of_contexts = _attend_backward(gradient, q, k, v, output, lse, rows.shared, ctx.scale)
            q_grad.index_add_(0, rows.shared.query_index, of_queries)
            for total, part in zip((k_grad, v_grad), of_contexts, strict=True):
                total.index_add_(0, rows.shared.key_index, part)
        return q_grad, k_grad, v_grad, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output [queries, heads, size] and log-sum-exps [heads, queries]."""
    s = sequences
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        _pick(q, s.query_index), _pick(k, s.key_index), _pick(v, s.key_index), s.query_bounds, s.key_bounds,
        s.most_queries, s.most_keys, 0.0, s.causal, False, scale=scale,
    )  # fmt: skip
    return output, lse


def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values of these sequences."""
    s = sequences
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        _pick(gradient, s.query_index), _pick(q, s.query_index), _pick(k, s.key_index), _pick(v, s.key_index),
        _pick(output, s.query_index), lse if s.query_index is None else lse[:, s.query_index].contiguous(),
        s.query_bounds, s.key_bounds, s.most_queries, s.most_keys, 0.0, s.causal, no_dropout,
        torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _placed(x: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """The inverse of :func:`_pick`, with zeros for tokens that were not picked."""
    return x if index is None else torch.zeros_like(like).index_add_(0, index, x)
