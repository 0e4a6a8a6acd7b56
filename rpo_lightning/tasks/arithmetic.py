"""Chained arithmetic modulo 100: the embedded task.

A question is a chain such as ``49a-1b*3c-8=`` (start at 49; step a subtracts 1; step b multiplies by
3; …). The chain of thought writes out every step and ends with the answer::

    a49-1=48b48*3=44c44-8=36#36

With 20 steps it is about 190 tokens long against an answer of three. Each step may be written twice,
so that lengths vary and carry no information. One character is one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rpo_lightning.errors import ConfigurationError
from rpo_lightning.sources import DataSource

STEP_NAMES = "abcdefghijklmnopqrst"
MODULUS = 100
# Few multiplication facts, so that a batch sees each of them often enough to learn from the reward.
LARGEST_OPERAND = {"+": 9, "-": 9, "*": 3}
SMALLEST_OPERAND = {"+": 1, "-": 1, "*": 2}
_APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


@dataclass(frozen=True)
class ArithmeticProblem:
    """A start value and the steps ``(operator, operand)`` that follow it."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The question text."""
        return (
            f"{self.start}" + "".join(f"{n}{op}{y}" for n, (op, y) in zip(STEP_NAMES, self.steps, strict=False)) + "="
        )

    @property
    def values(self) -> list[int]:
        """The value before the first step and after each one."""
        values = [self.start]
        for operator, operand in self.steps:
            values.append(_APPLY[operator](values[-1], operand) % MODULUS)
        return values

    @property
    def answer(self) -> int:
        """The final value."""
        return self.values[-1]

    def solution(self, written_twice: Sequence[bool]) -> str:
        """A correct chain of thought and the answer.

        Args:
            written_twice: For each step, whether it is repeated.
        """
        values = self.values
        text = ""
        for i, (operator, operand) in enumerate(self.steps):
            line = f"{STEP_NAMES[i]}{values[i]}{operator}{operand}={values[i + 1]}"
            text += line * (2 if written_twice[i] else 1)
        return f"{text}#{values[-1]}"


def draw_problem(rng: np.random.Generator, operations: int) -> ArithmeticProblem:
    """Draw a problem of ``operations`` steps."""
    start = int(rng.integers(MODULUS))
    operators = [str(op) for op in rng.choice(list("+-*"), size=operations)]
    operands = [int(rng.integers(SMALLEST_OPERAND[op], LARGEST_OPERAND[op] + 1)) for op in operators]
    return ArithmeticProblem(start, tuple(zip(operators, operands, strict=True)))


class ArithmeticChain(DataSource):
    """A data source of arithmetic problems, for ``RPODataModule``.

    Args:
        size: How many problems.
        operations: Steps of each problem, at most 20.
        seed: Different seeds give disjoint sets for all practical purposes.
    """

    def __init__(self, size: int, operations: int = 20, seed: int = 0) -> None:
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
            yield {"question": problem.question, "answer": str(problem.answer)}

    def __repr__(self) -> str:
        return f"ArithmeticChain(size={self.size}, operations={self.operations}, seed={self.seed})"
