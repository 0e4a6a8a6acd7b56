"""A task for small pretrained models: word problems of one and two steps, made from templates and numbers.

A question is a short story with two or three numbers, such as "Nora has 4 boxes with 6 pencils in each box and gives
away 5 pencils. How many pencils does Nora have left?". The answer is a whole number above 0. A model of 135M parameters
solves some of them, so a run on a CPU has something to learn from (``configs/word_problems_smollm2.yaml``).

Questions to train on and questions held out come from the same templates and share no problem: a problem belongs to one
of the two by a hash of its text, whatever the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.sources import DataSource

Part = Literal["train", "held_out"]

_NAMES = ("Nora", "Omar", "Lucy", "Ben", "Aisha", "Leo", "Mina", "Paul", "Rosa", "Tom", "Yuki", "Sam")
_THINGS = ("apples", "pencils", "books", "stickers", "marbles", "cookies", "shells", "cards", "stamps", "flowers")
_SHOPS = ("pens", "cups", "hats", "toys", "plants", "notebooks", "lamps", "bags")
_HELD_OUT_SHARE = 0.25  # of all problems
_MOST = 1_000  # some stories have no more than a few hundred numbers


@dataclass(frozen=True)
class _Template:
    """A story, its arithmetic, and the ranges (both ends included) of its numbers."""

    text: str
    answer: Callable[..., int]
    ranges: tuple[tuple[int, int], ...]


_ONE_STEP = (
    _Template("{name} has {0} {things} and buys {1} more. How many {things} does {name} have now?",
              lambda a, b: a + b, ((3, 12), (2, 9))),
    _Template("{name} had {0} {things} and gave away {1} of them. How many {things} are left?",
              lambda a, b: a - b, ((8, 18), (2, 7))),
    _Template("There are {0} boxes with {1} {things} in each box. How many {things} are there in total?",
              lambda a, b: a * b, ((2, 6), (2, 7))),
    _Template("One of the {shop} costs {0} dollars. How many dollars do {1} {shop} cost?",
              lambda a, b: a * b, ((2, 7), (2, 6))),
    _Template("{name} reads {0} pages every day. How many pages does {name} read in {1} days?",
              lambda a, b: a * b, ((2, 9), (2, 6))),
    _Template("{name} is {0} years old. How old will {name} be in {1} years?",
              lambda a, b: a + b, ((5, 30), (2, 9))),
)  # fmt: skip
_TWO_STEPS = (
    _Template("{name} has {0} boxes with {1} {things} in each box and gives away {2} {things}. "
              "How many {things} does {name} have left?",
              lambda a, b, c: a * b - c, ((2, 5), (2, 6), (1, 3))),
    _Template("{name} has {0} {things}, buys {1} more and then loses {2} of them. "
              "How many {things} does {name} have now?",
              lambda a, b, c: a + b - c, ((5, 12), (2, 8), (1, 6))),
    _Template("{name} buys {0} {shop} for {1} dollars each and one book for {2} dollars. "
              "How many dollars does {name} pay in total?",
              lambda a, b, c: a * b + c, ((2, 5), (2, 5), (2, 9))),
    _Template("{name} has {0} dollars and buys {1} {shop} for {2} dollars each. "
              "How many dollars does {name} have left?",
              lambda a, b, c: a - b * c, ((26, 40), (2, 5), (2, 5))),
    _Template("{name} has {0} {things}. {friend} has {1} more {things} than {name}. "
              "How many {things} do they have together?",
              lambda a, b: a + a + b, ((2, 9), (1, 6))),
    _Template("A bus has {0} passengers. At a stop {1} get off and {2} get on. How many passengers are on the bus now?",
              lambda a, b, c: a - b + c, ((10, 20), (2, 7), (1, 9))),
)  # fmt: skip


class WordProblems(DataSource):
    """A data source of distinct word problems, for ``RPODataModule``.

    Args:
        size: Number of problems, at most 1,000.
        part: ``train``, or ``held_out`` for problems that no training set has.
        steps: How many steps a problem takes: 1, 2, or 0 for as many of one as of two.
        seed: Seed of the problems.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(self, size: int, part: Part = "train", steps: int = 0, seed: int = 0) -> None:
        if not 1 <= size <= _MOST or part not in ("train", "held_out") or steps not in (0, 1, 2):
            raise ConfigurationError(
                f"WordProblems needs 1 <= size <= {_MOST}, part train or held_out, and steps 0, 1 or 2; "
                f"got size={size}, part={part}, steps={steps}"
            )
        self.size = size
        self.part = part
        self.steps = steps
        self.seed = seed

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield rows with a ``question``, an ``answer`` and the number of ``steps``."""
        rng = np.random.default_rng(self.seed)
        seen: set[str] = set()
        while len(seen) < self.size:
            steps = self.steps or 1 + len(seen) % 2
            question, answer = _draw(rng, _ONE_STEP if steps == 1 else _TWO_STEPS)
            if question not in seen and _is_held_out(question) == (self.part == "held_out"):
                seen.add(question)
                yield {"question": question, "answer": str(answer), "steps": str(steps)}

    def __repr__(self) -> str:
        return f"WordProblems(size={self.size}, part={self.part!r}, steps={self.steps}, seed={self.seed})"


def _draw(rng: np.random.Generator, templates: tuple[_Template, ...]) -> tuple[str, int]:
    template = templates[rng.integers(len(templates))]
    numbers = [int(rng.integers(low, high + 1)) for low, high in template.ranges]
    name, friend = (str(n) for n in rng.choice(_NAMES, 2, replace=False))
    things, shop = str(rng.choice(_THINGS)), str(rng.choice(_SHOPS))
    return template.text.format(*numbers, name=name, friend=friend, things=things, shop=shop), template.answer(*numbers)


def _is_held_out(question: str) -> bool:
    first = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(first) < _HELD_OUT_SHARE * 2**32
