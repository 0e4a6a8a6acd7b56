"""Flash attention's operators for sequences of any length, written out in torch for the CPU.

They round where the kernels round, and check their arguments as flash attention 2 does (``flash_api.cpp``).
"""

from __future__ import annotations

import torch


def _require(holds, what):
    if not holds:
        raise RuntimeError(f"flash attention: {what}")


def _check(q, k, v, query_bounds, key_bounds, most_queries, most_keys, causal):
    for bounds in (query_bounds, key_bounds):
        _require(bounds.dtype == torch.int32, "cu_seqlens must have dtype int32")
        _require(bounds.is_contiguous() and bounds.dim() == 1, "cu_seqlens must be contiguous")
    dtypes = {x.dtype for x in (q, k, v)}
    _require(len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}, f"only fp16 and bf16, got {dtypes}")
    _require(q.dim() == k.dim() == v.dim() == 3, "tokens, heads, size")
    _require(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "input must have contiguous last dimension")
    _require(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and q.shape[1] % k.shape[1] == 0, "heads")
    _require(type(most_queries) is int and type(most_keys) is int, "lengths must be numbers of the host")
    queries, keys = query_bounds.diff().tolist(), key_bounds.diff().tolist()
    _require((max(queries), max(keys)) == (most_queries, most_keys) and min(queries) >= 0, "longest sequences")
    _require(query_bounds[0] == key_bounds[0] == 0, "bounds begin at 0")
    _require(query_bounds[-1] == q.shape[0] and key_bounds[-1] == k.shape[0], "bounds end with the tokens")
    _require(not causal or all(a <= b for a, b in zip(queries, keys, strict=True)), "no empty rows")


def _sequences(q, k, v, query_bounds, key_bounds, causal, scale):
    """Slices of queries and keys, keys and values of each query head, and scores, of each sequence."""
    repeats = q.shape[1] // k.shape[1]
    starts, firsts = query_bounds.tolist(), key_bounds.tolist()
    for i in range(len(starts) - 1):
        own, keys = slice(starts[i], starts[i + 1]), slice(firsts[i], firsts[i + 1])
        key, value = (x[keys].repeat_interleave(repeats, 1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[own].float(), key) * (scale or q.shape[-1] ** -0.5)
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        yield own, keys, key, value, scores


def forward(q, k, v, query_bounds, key_bounds, most_queries, most_keys, dropout, causal, debug, scale=None, **_):
    _check(q, k, v, query_bounds, key_bounds, most_queries, most_keys, causal)
    output, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], q.shape[0])
    for own, _keys, _key, value, scores in _sequences(q, k, v, query_bounds, key_bounds, causal, scale):
        highest = scores.amax(-1, keepdim=True)
        exponentials = (scores - highest).exp()
        total = exponentials.sum(-1, keepdim=True)
        weighted = torch.einsum("hqk,khd->qhd", exponentials.to(q.dtype).float(), value)
        output[own] = (weighted / total.permute(1, 0, 2)).to(q.dtype)
        lse[:, own] = (highest + total.log()).squeeze(-1)
    state = (torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.empty(0, dtype=q.dtype))
    return output, lse, *state


def backward(
    gradient, q, k, v, output, lse, query_bounds, key_bounds, most_queries, most_keys, dropout, causal, state, unused,
    scale=None, **_,
):  # fmt: skip
    _check(q, k, v, query_bounds, key_bounds, most_queries, most_keys, causal)
    _require(gradient.dtype == q.dtype == output.dtype and lse.dtype == torch.float32, "dtypes of the backward pass")
    _require(lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous(), "log-sum-exps")
    _require(gradient.stride(-1) == output.stride(-1) == 1, "gradient and output must have contiguous last dimension")
    of_q, of_k, of_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    factor, repeats = scale or q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    dot = (gradient.float() * output.float()).sum(-1).T
    for own, keys, key, value, scores in _sequences(q, k, v, query_bounds, key_bounds, causal, scale):
        probs = (scores - lse[:, own, None]).exp()
        of_probs = torch.einsum("qhd,khd->hqk", gradient[own].float(), value)
        of_scores = (probs * (of_probs - dot[:, own, None])).to(q.dtype).float()
        of_q[own] = (torch.einsum("hqk,khd->qhd", of_scores, key) * factor).to(q.dtype)
        # The kernel writes these for every query head in 16 bits, and sums heads that share keys afterwards.
        for_heads = (
            torch.einsum("hqk,qhd->khd", of_scores, q[own].float()) * factor,
            torch.einsum("hqk,qhd->khd", probs.to(q.dtype).float(), gradient[own].float()),
        )
        of_k[keys], of_v[keys] = (
            x.to(q.dtype).unflatten(1, (-1, repeats)).float().sum(2).to(q.dtype) for x in for_heads
        )
    return of_q, of_k, of_v
