"""Packages of flash attention 3 and 4, written out as far as torch calls them, for the pretend GPU."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn.attention import _fa3, _fa4

from tests.runs.pretend_gpu import flash
from tests.runs.pretend_gpu.device import PretendLibrary, PretendTensor


class Package:
    """Kernels that compute as flash attention 2 does.

    Attributes:
        fault: Factor of the gradients of values; 1 is right.
        calls: Calls by kernel.
    """

    def __init__(self) -> None:
        self.fault = 1.0
        self.calls: Counter[str] = Counter()

    def forward(self, q, k, v, *, bounds, longest, scale, causal):
        self.calls["forward"] += 1
        inner = [x.inner for x in (q, k, v, *bounds)]
        output, lse, *_ = flash.forward(*inner, *longest, 0.0, causal, False, scale=scale)
        return PretendTensor(output), PretendTensor(lse)

    def backward(self, *tensors, bounds, longest, scale, causal):
        """Gradients from the output's, queries, keys, values, the output and the log-sum-exps."""
        self.calls["backward"] += 1
        inner = [x.inner for x in (*tensors, *bounds)]
        of_q, of_k, of_v = flash.backward(*inner, *longest, 0.0, causal, None, None, scale=scale)
        return tuple(PretendTensor(x) for x in (of_q, of_k, of_v * self.fault))


def flash_attention_3(package):
    """``flash_attn_interface``: the operators that it registers."""

    def fwd(q, k, v, *others):
        assert others[3] is None  # no output is given
        output, lse = package.forward(
            q, k, v, bounds=others[4:6], longest=others[9:11], scale=others[20], causal=others[21]
        )
        return output, lse, None, None

    def bwd(gradient, q, k, v, output, lse, *others):
        parts = package.backward(
            gradient, q, k, v, output, lse, bounds=others[3:5], longest=others[7:9], scale=others[9], causal=others[10]
        )
        for place, part in zip(others[:3], parts, strict=True):
            place.copy_(part)

    return SimpleNamespace(fwd=fwd, bwd=bwd)


def flash_attention_4(package):
    """``flash_attn.cute.interface``."""
    module = ModuleType("flash_attn.cute.interface")

    def forward(q, k, v, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **_):
        bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return package.forward(q, k, v, bounds=bounds, longest=longest, scale=softmax_scale, causal=causal)

    def backward(q, k, v, output, gradient, lse, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, **_):
        bounds = (cu_seqlens_q, cu_seqlens_k)
        longest = [int(x.inner.diff().max()) for x in bounds]
        return package.backward(
            gradient, q, k, v, output, lse, bounds=bounds, longest=longest, scale=softmax_scale, causal=causal
        )

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    return module


def with_cuda(check):
    """A check that finds CUDA available. Elsewhere torch would then call what this build does not have."""

    def checked(*arguments, **named):
        with patch.object(torch.cuda, "is_available", return_value=True):
            return check(*arguments, **named)

    return checked


def install(monkeypatch) -> dict[str, Package]:
    """Install both packages for a test, by the name of what they implement."""
    packages = {"FA3": Package(), "FA4": Package()}
    for module, check in ((_fa3, "_fa3_common_support_error"), (_fa4, "_fa4_common_support_error")):
        monkeypatch.setattr(module, "Library", PretendLibrary)
        monkeypatch.setattr(module, "_get_device_major", lambda _: 9)
        monkeypatch.setattr(module, check, with_cuda(getattr(module, check)))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(torch.ops, "flash_attn_3", flash_attention_3(packages["FA3"]), raising=False)
    cute = flash_attention_4(packages["FA4"])
    monkeypatch.setattr(_fa4, "_fa4_import_module", lambda _: cute)
    return packages
