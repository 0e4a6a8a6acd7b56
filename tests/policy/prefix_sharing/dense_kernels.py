"""Plain formulas of flash attention's kernels for sequences of any length, which exist on GPUs only."""

from __future__ import annotations

from itertools import pairwise

import torch


def dense_sequences(q, k, v, sequences, scale):
    """Yield each sequence's queries, keys, values, slices of queries and keys, and scores [heads, queries, keys]."""
    q, k, v = q[sequences.queries], k[sequences.keys], v[sequences.keys]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bounds = (sequences.query_bounds.tolist(), sequences.key_bounds.tolist())
    for (start, stop), (first, last) in zip(*(pairwise(b) for b in bounds), strict=True):
        asked, keys, values = q[start:stop], k[first:last], v[first:last]
        scores = torch.einsum("qhd,khd->hqk", asked, keys) * (scale or q.shape[-1] ** -0.5)
        if sequences.causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(diagonal=scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        yield asked, keys, values, slice(start, stop), slice(first, last), scores


def dense_attend(q, k, v, sequences, scale):
    parts = list(dense_sequences(q, k, v, sequences, scale))
    assert max(len(p[0]) for p in parts) == sequences.most_queries
    assert max(len(p[1]) for p in parts) == sequences.most_keys
    outputs = [torch.einsum("hqk,khd->qhd", scores.softmax(-1), values) for *_, values, _, _, scores in parts]
    return torch.cat(outputs), torch.cat([scores.logsumexp(-1) for *_, scores in parts], dim=1)


def dense_attend_backward(gradient, q, k, v, output, lse, sequences, scale):
    """Flash attention's backward pass, from the given output and log-sum-exp."""
    gradient, output, lse = gradient[sequences.queries], output[sequences.queries], lse[:, sequences.queries]
    repeats, factor = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    gradients = []
    for asked, keys, values, own, _, scores in dense_sequences(q, k, v, sequences, scale):
        probs = (scores - lse[:, own, None]).exp()
        dot = (gradient[own] * output[own]).sum(-1).T[..., None]
        of_scores = probs * (torch.einsum("qhd,khd->hqk", gradient[own], values) - dot) * factor
        of_keys, of_values = (
            x.unflatten(1, (-1, repeats)).sum(2)
            for x in (
                torch.einsum("hqk,qhd->khd", of_scores, asked),
                torch.einsum("hqk,qhd->khd", probs, gradient[own]),
            )
        )
        gradients.append((torch.einsum("hqk,khd->qhd", of_scores, keys), of_keys, of_values))
    return tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))
