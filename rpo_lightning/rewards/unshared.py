"""Keeps large tensors of the trainer out of grading processes.

A forked process shares the trainer's memory until one of them writes to it. The trainer writes to weights, optimizer
states and an engine's tensors in every update. The processes would then be the only ones to hold the old numbers: as
much memory as the trainer has, once for every time that processes are forked.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Smaller tensors are left alone: each takes two calls of the system.
_SMALLEST = 2**20


@contextmanager
def unshared(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have processes that are forked meanwhile not get the memory of large tensors.

    They must neither touch nor free these tensors: keep a reference in them. Tensors on a GPU are left alone, and all
    tensors where the system is not Linux.

    Args:
        tensors: Tensors that the trainer writes to.
    """
    library = ctypes.CDLL(None)
    advise = getattr(library, "madvise", None)
    if advise is None or not hasattr(mmap, "MADV_DONTFORK"):
        yield
        return
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # what was freed would be inherited, too
    ranges = _whole_pages(tensors)
    try:
        for start, length in ranges:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTFORK)
        yield
    finally:
        for start, length in ranges:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DOFORK)


def _whole_pages(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Start and length of the pages that lie within the storages of large tensors on the CPU, each once."""
    sizes = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu" and local.layout == torch.strided:
            try:
                storage = local.untyped_storage()
                if storage.nbytes() >= _SMALLEST:
                    sizes[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, ValueError):  # quantised weights and states may be made of other tensors
                continue
    page = mmap.PAGESIZE
    found = []
    for start, size in sizes.items():
        first = -(-start // page) * page
        last = (start + size) // page * page
        if last > first:
            found.append((first, last - first))
    return found
