"""Sends small tensors to a device, and receives them, in few copies.

Every copy from ordinary memory makes the host wait for the GPU. Micro-batches have a dozen small inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on a device, as views of one tensor for each dtype.

    From pinned memory copies do not wait. Memory is pinned where torch can use a GPU.
    """
    if device.type == "cpu":
        return list(tensors)
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        together = torch.cat([tensors[i].reshape(-1) for i in chosen])
        if torch.cuda.is_available():
            together = together.pin_memory()
        parts = together.to(device, non_blocking=True).split([tensors[i].numel() for i in chosen])
        found |= {i: part.view(tensors[i].shape) for i, part in zip(chosen, parts, strict=True)}
    return [found[i] for i in range(len(tensors))]


def received_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype on the CPU, copied at once."""
    if not tensors:
        return []
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
