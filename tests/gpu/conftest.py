"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import restore_flash_attention_impl

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.prefix_sharing import gpu as packed_attention
from rpo_lightning.policy.prefix_sharing.flash_choice import activate
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


@pytest.fixture
def implementation(request):
    """Activates the implementation of flash attention that a test names; skips what is not installed or not for it."""
    try:
        activate(request.param, torch.device("cuda", 0))
    except ConfigurationError as error:
        pytest.skip(str(error))
    yield request.param
    restore_flash_attention_impl(_raise_warn=False)
