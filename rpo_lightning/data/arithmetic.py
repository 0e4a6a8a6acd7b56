"""The embedded task: chains of arithmetic modulo 100.

A question is a chain such as ``49a-1b*9c-8=``: start at 49, subtract 1 in step a, multiply by 9 in step b, and so on.
The chain of thought writes out every step and ends with the answer:

    a49-1=48b48*9=32c32-8=24#24

One character is one token. A response to a question of 24 steps has about 190 tokens, three of them for the answer. The
embedded reasoner knows the first 26 step names. Longer chains need a reasoner made for them
(``python -m rpo_lightning.cli.scripts.make_reasoner``).
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.sources import DataSource

STEP_NAMES = string.ascii_letters + "αβγδεζηθικλμνξοπρστυφχψω" + "абвгдежзийклмнопрстуфхцчшщъыьэюя"
MODULUS = 100
_APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


@dataclass(frozen=True)
class ArithmeticProblem:
    """A question of the task.

    Attributes:
        start: The start value.
        steps: Pairs ``(operator, operand)``.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The question text."""
        steps = "".join(f"{name}{op}{y}" for name, (op, y) in zip(STEP_NAMES, self.steps, strict=False))
        return f"{self.start}{steps}="

    def solution(self, left_out: Collection[int] = (), foreign_steps: int = 0) -> str:
        """A chain of thought with its answer.

        Args:
            left_out: Indices of steps to skip, which most likely makes the answer wrong.
            foreign_steps: How many of the first steps are written in a style that the reasoners do not use, with the
                name at the end of a step: ``49-1=48=a48*9=32=b``.
        """
        value, text = self.start, ""
        for index, (operator, operand) in enumerate(self.steps):
            if index not in left_out:
                result = _APPLY[operator](value, operand) % MODULUS
                step = f"{value}{operator}{operand}={result}"
                text += f"{step}={STEP_NAMES[index]}" if index < foreign_steps else f"{STEP_NAMES[index]}{step}"
                value = result
        return f"{text}#{value}"

    @property
    def answer(self) -> str:
        """The gold answer: the value after all steps."""
        return self.solution().rpartition("#")[2]


def draw_problem(rng: np.random.Generator, operations: int) -> ArithmeticProblem:
    """Draw a problem of ``operations`` steps."""
    start = int(rng.integers(MODULUS))
    operators = rng.choice(list(_APPLY), size=operations)
    operands = rng.integers(1, 10, size=operations)
    return ArithmeticProblem(start, tuple((str(op), int(y)) for op, y in zip(operators, operands, strict=True)))


class ArithmeticChain(DataSource):
    """A data source of arithmetic problems, for ``RPODataModule``.

    Args:
        size: Number of problems.
        operations: Steps of each problem, at most 108; the embedded reasoner knows 26.
        seed: Seed of the problems. Sets with different seeds have next to no problem in common.
    """

    def __init__(self, size: int, operations: int = 24, seed: int = 0) -> None:
        if size < 1 or not 1 <= operations <= len(STEP_NAMES):
            raise ConfigurationError(
                f"ArithmeticChain needs size >= 1 and 1 <= operations <= {len(STEP_NAMES)}; "
                f"got size={size}, operations={operations}"
            )
        self.size = size
        self.operations = operations
        self.seed = seed

    def problems(self) -> Iterator[ArithmeticProblem]:
        """Yield the problems."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.size):
            yield draw_problem(rng, self.operations)

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield rows with a ``question`` and an ``answer``."""
        for problem in self.problems():
            yield {"question": problem.question, "answer": problem.answer}

    def __repr__(self) -> str:
        return f"ArithmeticChain(size={self.size}, operations={self.operations}, seed={self.seed})"
