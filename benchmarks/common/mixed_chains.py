"""Problems of very different difficulty: a data source for ``hard_questions.py``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rpo_lightning.data.arithmetic import ArithmeticChain, ArithmeticProblem, draw_problem


class MixedChains(ArithmeticChain):
    """Arithmetic problems of several lengths, as many of each.

    Args:
        size: Number of problems.
        operations: Numbers of steps, in turn.
        seed: Seed of the problems.
    """

    def __init__(self, size: int, operations: list[int], seed: int = 0) -> None:
        super().__init__(size, max(operations), seed)
        self.lengths = operations

    def problems(self) -> Iterator[ArithmeticProblem]:
        """Yield the problems."""
        rng = np.random.default_rng(self.seed)
        for index in range(self.size):
            yield draw_problem(rng, self.lengths[index % len(self.lengths)])
