"""The ranks of a run: what they add up and what they tell each other.

Everything that has to be the same on all ranks (denominators of the loss, the decision to update, the cache,
what is logged) goes through here; gradients and parameters are the strategy's business. On one device every
operation returns what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


class Ranks:
    """Collectives over all ranks that train.

    Args:
        strategy: Lightning's strategy; one rank alone if not given.
    """

    def __init__(self, strategy: Any = None) -> None:
        self._strategy = strategy

    def follow(self, strategy: Any) -> None:
        """Be the ranks of another strategy, for whoever holds this object: a module may go from trainer to trainer."""
        self._strategy = strategy

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self._strategy is None else int(getattr(self._strategy, "world_size", 1))

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return 0 if self._strategy is None else int(getattr(self._strategy, "global_rank", 0))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the CPU."""
        return self._reduce(values, "sum")

    def max(self, values: Tensor) -> Tensor:
        """Maximum over ranks, on the CPU."""
        return self._reduce(values, "max")

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        return int(self.max(torch.tensor(count, dtype=torch.float64)))

    def gather(self, mine: T) -> list[T]:
        """What each rank has, in their order, on every rank."""
        return gather_objects(mine) if self.size > 1 else [mine]

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return values
        reduced: Tensor = self._strategy.reduce(values.to(self._strategy.root_device), reduce_op=how)
        return reduced.cpu()


def gather_objects(mine: T) -> list[T]:
    """What each process has, in the order of their ranks, on every one of them; a collective.

    It goes over the CPU: what is gathered are token ids and rows, and accelerators have better things to keep.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [mine]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine, group=_cpu_group(distributed.group.WORLD))
    return gathered


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """A group of all ranks that works in the CPU's memory, made once for each default group."""
    if "gloo" in str(distributed.get_backend(world)):
        return world
    return distributed.new_group(backend="gloo")


def gather_rows(rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all ranks; the first of those with equal keys, as metrics count them.

    Samplers repeat questions to give all ranks equally many. All ranks must call it.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for of_rank in gather_objects(rows):
        for row in of_rank:
            first.setdefault(tuple(row[k] for k in key), row)
    return list(first.values())
