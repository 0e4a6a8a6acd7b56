"""Chained arithmetic modulo 100: the embedded task.

A question is a chain such as ``49a-1b*9c-8=`` (start at 49; step a subtracts 1; step b multiplies by
9; …). The chain of thought writes out every step and ends with the answer::

    a49-1=48b48*9=32c32-8=24#24

With 24 steps it is about 190 tokens long against an answer of three. One character is one token. The
embedded reasoner knows the first 26 step names; longer chains need one made for them (``make_reasoner``).
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
    """A start value and the steps ``(operator, operand)`` that follow it."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The question text."""
        steps = "".join(f"{name}{op}{y}" for name, (op, y) in zip(STEP_NAMES, self.steps, strict=False))
        return f"{self.start}{steps}="

    def solution(self, left_out: Collection[int] = ()) -> str:
        """A chain of thought and its answer.

        Args:
            left_out: Indices of steps that are skipped; the answer is then most likely wrong.
        """
        value, text = self.start, ""
        for index, (operator, operand) in enumerate(self.steps):
            if index not in left_out:
                result = _APPLY[operator](value, operand) % MODULUS
                text += f"{STEP_NAMES[index]}{value}{operator}{operand}={result}"
                value = result
        return f"{text}#{value}"

    @property
    def answer(self) -> str:
        """The final value."""
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
        size: How many problems.
        operations: Steps of each problem; at most 26 for the embedded reasoner, 108 in all.
        seed: Different seeds give disjoint sets for all practical purposes.
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

    def rows(self) -> Iterator[dict[str, str]]:
        """Rows with a ``question`` and an ``answer``."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.size):
            problem = draw_problem(rng, self.operations)
            yield {"question": problem.question, "answer": problem.answer}

    def __repr__(self) -> str:
        return f"ArithmeticChain(size={self.size}, operations={self.operations}, seed={self.seed})"
