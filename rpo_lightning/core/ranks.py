"""What the ranks of a run add up and exchange.

Use it for everything that must be equal on all ranks: denominators of the loss, the decision to update, the cache,
logged values. Gradients and parameters belong to the strategy. With one rank, every operation returns its input.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


class Ranks:
    """Collectives over all ranks that train. All ranks must call each of them.

    Args:
        strategy: Lightning's strategy; a single rank if not given.
    """

    def __init__(self, strategy: Any = None) -> None:
        self._strategy = strategy

    def follow(self, strategy: Any) -> None:
        """Use another strategy, for all holders of this object: a module may move to another trainer."""
        self._strategy = strategy

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self._strategy is None else int(getattr(self._strategy, "world_size", 1))

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        return 0 if self._strategy is None else int(getattr(self._strategy, "global_rank", 0))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, returned on the CPU."""
        return self._reduce(values, "sum")

    def max(self, values: Tensor) -> Tensor:
        """Maximum over ranks, returned on the CPU."""
        return self._reduce(values, "max")

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        return int(self.max(torch.tensor(count, dtype=torch.float64)))

    def gather(self, mine: T) -> list[T]:
        """Every rank's object, in rank order, on every rank."""
        return gather_objects(mine) if self.size > 1 else [mine]

    def cores(self) -> int:
        """Processor cores of this rank; those that ranks of a node have in common are divided. A collective."""
        host, mine = socket.gethostname(), os.sched_getaffinity(0)
        everyone = [cores for name, cores in self.gather((host, mine)) if name == host]
        return int(sum(Fraction(1, sum(core in cores for cores in everyone)) for core in mine))

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return values.cpu()
        reduced: Tensor = self._strategy.reduce(values.to(self._strategy.root_device), reduce_op=how)
        return reduced.cpu()


def gather_objects(mine: T) -> list[T]:
    """Every process's object, in rank order, on every process; a collective.

    It uses the CPU's memory, because token ids and rows would take accelerator memory from the policy.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [mine]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine, group=_cpu_group(distributed.group.WORLD))
    return gathered


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """A process group of all ranks for objects in the CPU's memory; made once for each default group."""
    if "gloo" in str(distributed.get_backend(world)):
        return world
    return distributed.new_group(backend="gloo")


def gather_rows(rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all ranks, one for each key; a collective.

    Distributed samplers repeat questions to give all ranks equally many. The first row of a key stays, as in the
    metrics.

    Args:
        rows: This rank's rows.
        key: Columns that identify a row.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for of_rank in gather_objects(rows):
        for row in of_rank:
            first.setdefault(tuple(row[k] for k in key), row)
    return list(first.values())
