"""Several ranks that share one copy of an engine's weights.

vLLM's external launcher runs one engine per rank. The engines of a tensor-parallel group must get the same requests in
the same order, and each returns all completions. The ranks of a group therefore pool their requests, generate for all
of them, and use the completions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class TensorParallelGroup:
    """The ranks that generate together.

    Args:
        process_group: Their process group on the CPU; a single rank if not given.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._process_group = process_group

    @classmethod
    def of(cls, llm: Any, size: int) -> TensorParallelGroup:
        """The group of a running engine.

        Args:
            llm: The engine.
            size: Number of ranks that share its weights.
        """
        if size == 1:
            return cls()
        from vllm.distributed.parallel_state import get_tp_group

        return cls(get_tp_group().cpu_group)

    def gather(self, mine: Sequence[T]) -> tuple[list[T], int]:
        """The requests of all ranks, in rank order, and the index of the first of this rank's."""
        if self._process_group is None:
            return list(mine), 0
        size = torch.distributed.get_world_size(self._process_group)
        rank = torch.distributed.get_rank(self._process_group)
        pooled: list[Any] = [None] * size
        torch.distributed.all_gather_object(pooled, list(mine), group=self._process_group)
        return [request for requests in pooled for request in requests], sum(len(r) for r in pooled[:rank])
