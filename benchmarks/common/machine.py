"""Which machine a figure was measured on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch


def hardware() -> str:
    """GPU or processor, cores and torch version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def ceilings(size: int = 8192, repetitions: int = 20) -> dict[str, float]:
    """What the GPU reaches at best: bf16 products of random matrices in TFLOP/s, copies in GB/s read and written."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)

    def milliseconds(work: Callable[[], object]) -> float:
        for _ in range(3):
            work()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repetitions):
            work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / repetitions

    product, copy = milliseconds(lambda: left @ right), milliseconds(lambda: target.copy_(source))
    return {
        "bf16_tflops": 2 * size**3 / product / 1e9,
        "copy_gbytes_per_s": 2 * source.numel() * source.element_size() / copy / 1e6,
    }


class PeakMemory:
    """Peak memory of a block beyond what was held before, in bytes: CUDA's own count, or the process's size sampled."""

    def __init__(self, interval_seconds: float = 0.005) -> None:
        self.bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back, so that growth is seen
            self._before = self._peak = psutil.Process().memory_info().rss
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()
            peak = self._peak
        self.bytes = peak - self._before

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(self._interval):
            self._peak = max(self._peak, process.memory_info().rss)


def peak_bytes(before: int) -> int:
    """Most memory this process ever held: CUDA's own count, or its size beyond ``before`` bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
