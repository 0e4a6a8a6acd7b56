"""Kernels that compute something else fail their trial."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rpo_lightning.policy.prefix_sharing import gpu as gpu_attention
from rpo_lightning.policy.prefix_sharing import gpu_check
from tests.policy.prefix_sharing.dense_kernels import dense_attend, dense_attend_backward


def agree():
    return gpu_check.kernels_agree.__wrapped__(torch.device("cpu"), torch.bfloat16, 6, 2, 16, "FA2")


def top_left(q, k, v, sequences, scale):
    """A kernel whose first query sees the first key only, as in torch's SDPA."""
    if not sequences.causal:
        return dense_attend(q, k, v, sequences, scale)
    pairs = torch.stack([sequences.query_bounds.diff(), sequences.key_bounds.diff()]).amin(0)
    seen = torch.cat([first + torch.arange(n) for first, n in zip(sequences.key_bounds, pairs, strict=False)])
    keys = seen if isinstance(sequences.keys, slice) else sequences.keys[seen]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), pairs.cumsum(0).int()])
    return dense_attend(q, k, v, replace(sequences, keys=keys, key_bounds=bounds, most_keys=int(pairs.max())), scale)


def without_contexts(*arguments):
    """A backward pass without the key gradients of shared contexts."""
    of_queries, of_keys, of_values = dense_attend_backward(*arguments)
    return of_queries, of_keys * float(arguments[6].causal), of_values


def first_tile(q, k, v, sequences, scale):
    """A kernel that loses keys beyond the first 128 of a context."""
    if sequences.causal:
        return dense_attend(q, k, v, sequences, scale)
    lengths = sequences.key_bounds.diff()
    seen = torch.cat(
        [first + torch.arange(min(n, 128)) for first, n in zip(sequences.key_bounds, lengths, strict=False)]
    )
    keys = torch.arange(len(k))[sequences.keys][seen]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.clamp(max=128).cumsum(0).int()])
    return dense_attend(q, k, v, replace(sequences, keys=keys, key_bounds=bounds, most_keys=128), scale)


def without_numbers(*arguments):
    """A backward pass with NaN in the gradients of values, and right ones of queries and keys."""
    of_queries, of_keys, of_values = dense_attend_backward(*arguments)
    return of_queries, of_keys, of_values * torch.nan


def missing(*arguments):
    raise RuntimeError("no such operator")


def refusing(*arguments):
    raise AssertionError("only heads of 64")


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        ("_attend", top_left, "off by"),
        ("_attend_backward", without_contexts, "off by"),
        ("_attend_backward", without_numbers, "off by nan"),
        ("_attend", first_tile, "off by"),
        ("_attend", missing, "no such operator"),
        ("_attend", refusing, "only heads of 64"),
    ],
)
def test_kernels_that_compute_something_else_are_not_used_and_a_warning_says_why(
    packed, monkeypatch, caplog, name, kernel, reason
):
    monkeypatch.setattr(gpu_attention, name, kernel)
    assert not agree()
    assert len(caplog.records) == 1
    assert reason in caplog.text
