"""Problems of very different difficulty: a data source for ``hard_questions.py``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rpo_lightning.data.arithmetic import draw_problem
from rpo_lightning.data.sources import DataSource


class MixedChains(DataSource):
    """Arithmetic problems of several lengths, as many of each.

    Args:
        size: Number of problems.
        operations: Numbers of steps.
        seed: Seed of the problems.
    """

    def __init__(self, size: int, operations: list[int], seed: int = 0) -> None:
        self.size = size
        self.operations = operations
        self.seed = seed

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield rows with a ``question`` and an ``answer``."""
        rng = np.random.default_rng(self.seed)
        for index in range(self.size):
            problem = draw_problem(rng, self.operations[index % len(self.operations)])
            yield {"question": problem.question, "answer": problem.answer}
