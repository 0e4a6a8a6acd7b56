"""Records of all ranks on rank zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed


def gather_rows(rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all ranks, on rank zero; the first of those with equal keys, as metrics count them.

    Samplers repeat questions to give all ranks equally many. All ranks must call it. It goes over the CPU: rows
    hold whole responses, and accelerators have better things to keep.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        group = torch.distributed.new_group(backend="gloo")
        is_first = torch.distributed.get_rank() == 0
        gathered: list[Any] | None = [None] * torch.distributed.get_world_size() if is_first else None
        torch.distributed.gather_object(rows, gathered, dst=0, group=group)
        torch.distributed.destroy_process_group(group)
        rows = [row for of_rank in gathered or [] for row in of_rank]
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        first.setdefault(tuple(row[k] for k in key), row)
    return list(first.values())
