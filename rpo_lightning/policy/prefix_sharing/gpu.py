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

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rpo_lightning.policy.prefix_sharing.arrangement import Arrangement
from rpo_lightning.policy.prefix_sharing.cpu import merge
from rpo_lightning.policy.prefix_sharing.transfer import sent_together


@dataclass(frozen=True)
class Sequences:
    """Sequences for one kernel call: the queries of each attend to the keys of the same sequence.

    Attributes:
        queries: Which of the computed tokens are queries.
        keys: Which of the detached tokens, followed by the computed ones, are keys: a slice, or indices.
        query_bounds: Start of each sequence's queries, and the end of the last, [sequences + 1], int32.
        key_bounds: Start of each sequence's keys, and the end of the last, [sequences + 1], int32.
        most_queries: Largest number of queries of a sequence.
        most_keys: Largest number of keys of a sequence.
        causal: Whether the last query sees all keys, the one before it all but the last, and so on. If not, every
            query sees every key.
    """

    queries: slice
    keys: slice | Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int
    causal: bool


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
    def of(cls, arrangement: Arrangement, device: torch.device) -> PackedRows:
        """Describe concatenated rows. All that the kernels need is sent to the device together."""
        a, shapes, branching = arrangement, arrangement.shapes, arrangement.branching
        queries = [shapes[i].trunk for i in a.order]
        keys = [shapes[i].detached + n for i, n in zip(a.order, queries, strict=True)]
        suffixes = [n for i in branching for n in shapes[i].suffixes]
        lengths = [[*queries, *suffixes], [*keys, *suffixes]]
        if branching:
            lengths += [
                [sum(shapes[i].suffixes) for i in branching],
                [shapes[i].detached + shapes[i].context for i in branching],
            ]
        on_host = [torch.from_numpy(np.array([0, *accumulate(x)], dtype=np.int32)) for x in lengths]
        if a.detached:
            on_host += [_with_detached(a, a.order, a.tokens), _with_detached(a, branching, a.contexts)]
        bounds = sent_together(on_host, device)
        picked: list[slice | Tensor] = list(bounds[-2:]) if a.detached else [slice(None), slice(0, a.contexts)]
        own = Sequences(slice(None), picked[0], bounds[0], bounds[1], max(lengths[0]), max(lengths[1]), causal=True)
        if not branching:
            return cls(own, None)
        shared = Sequences(
            slice(a.suffixes, None), picked[1], bounds[2], bounds[3], max(lengths[2]), max(lengths[3]), causal=False
        )
        return cls(own, shared)


def _with_detached(arrangement: Arrangement, rows: Sequence[int], stop: int) -> Tensor:
    """Indices of rows' computed tokens up to ``stop``, those of each row's context after its detached ones."""
    a, parts = arrangement, []
    position = 0
    for i in rows:
        shape = a.shapes[i]
        position = a.context_starts[i] + shape.trunk
        parts.append(np.arange(a.detached_starts[i], a.detached_starts[i] + shape.detached))
        parts.append(np.arange(a.detached + a.context_starts[i], a.detached + position))
    parts.append(np.arange(a.detached + position, a.detached + stop))
    return torch.from_numpy(np.concatenate(parts))


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
            suffixes = rows.shared.queries
            with_context, lse_with_context = _attend(q, k, v, rows.shared, scale)
            merged, merged_lse = merge(output[suffixes], lse[:, suffixes].T, with_context, lse_with_context.T)
            output[suffixes], lse[:, suffixes] = merged, merged_lse.T
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
        k_grad, v_grad = (_placed(x, k, rows.own.keys) for x in own)
        if rows.shared is not None:
            of_queries, *of_contexts = _attend_backward(gradient, q, k, v, output, lse, rows.shared, ctx.scale)
            q_grad[rows.shared.queries] += of_queries
            for total, part in zip((k_grad, v_grad), of_contexts, strict=True):
                _add(total, rows.shared.keys, part)
        return q_grad, k_grad, v_grad, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output [queries, heads, size] and log-sum-exps [heads, queries]."""
    s = sequences
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[s.queries], k[s.keys], v[s.keys], s.query_bounds, s.key_bounds, s.most_queries, s.most_keys, 0.0, s.causal,
        False, scale=scale,
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
        gradient[s.queries], q[s.queries], k[s.keys], v[s.keys], output[s.queries], lse[:, s.queries].contiguous(),
        s.query_bounds, s.key_bounds, s.most_queries, s.most_keys, 0.0, s.causal, no_dropout,
        torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip


def _placed(x: Tensor, like: Tensor, where: slice | Tensor) -> Tensor:
    """A tensor like another one with ``x`` at some positions, and zeros at the others; all of it for a whole slice."""
    if isinstance(where, slice) and where == slice(None):
        return x
    return _add(torch.zeros_like(like), where, x)


def _add(total: Tensor, where: slice | Tensor, part: Tensor) -> Tensor:
    if isinstance(where, slice):
        total[where] += part
        return total
    return total.index_add_(0, where, part)
