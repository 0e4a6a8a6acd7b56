"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest
import torch

from rpo_lightning.policy.prefix_sharing import gpu as packed_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import kernels_agree


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Calls of the kernels, which are tried anew."""
    calls, attend = [], packed_attention._attend

    def note(q, k, v, sequences, scale):
        calls.append(sequences)
        return attend(q, k, v, sequences, scale)

    monkeypatch.setattr(packed_attention, "_attend", note)
    kernels_agree.cache_clear()
    return calls
