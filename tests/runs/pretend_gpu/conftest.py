"""What the claims on the pretend GPU share. They run in processes of their own; see ``test_pretend_gpu.py``."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from rpo_lightning.policy.prefix_sharing import attention, gpu_check
from tests.runs.pretend_gpu import device, guard

IN_OWN_PROCESS = os.environ.get("RPO_PRETEND_GPU") == "1"


@pytest.fixture(scope="session")
def _guard():
    assert IN_OWN_PROCESS, "the guard changes the process: run test_pretend_gpu.py"
    guard.install()
    torch.set_num_threads(1)


@pytest.fixture
def pretend_gpu(_guard, monkeypatch):
    """A GPU of capability 9.0, and what it was asked to do."""

    def causal(queries, keys, where):
        mask = torch.ones((queries, keys), dtype=torch.bool, device="cpu").tril(diagonal=keys - queries)
        return mask if where.type == "cpu" else device.PretendTensor(mask)

    monkeypatch.setattr(attention, "_causal", causal)  # torch's own bias is no tensor that can pretend
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    of_cpu = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": of_cpu("cpu"))
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    gpu_check.kernels_agree.cache_clear()
    device.COUNTS.clear()
    with device.PretendGPU():
        yield device.COUNTS
    gpu_check.kernels_agree.cache_clear()


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


def pytest_unconfigure(config):
    """Leave without the interpreter's own end, in which torch would call what the guard pointed to."""
    if IN_OWN_PROCESS:
        sys.stdout.flush()
        os._exit(config.exit_status)
