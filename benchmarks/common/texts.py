"""Made-up reasoning, for measurements that need texts as policies write them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


class Texts:
    """Made-up reasoning as token ids.

    Args:
        tokenizer: The tokenizer.
        data: A file with questions and answers; templates if not given.
        seed: Seed of everything that is drawn.
    """

    def __init__(self, tokenizer: Any, data: Path | None, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        rows = [json.loads(line) for line in data.read_text().splitlines()] if data else []
        self._steps = [line for row in rows for line in row["answer"].split("\n") if not line.startswith("####")]

    def _step(self) -> str:
        a, b = self._random.randrange(2, 99), self._random.randrange(2, 99)
        said = (
            self._random.choice(self._steps) if self._steps else f"{a} boxes of {b} apples are {a}*{b}={a * b} apples."
        )
        return f"First, {said} So \\( \\frac{{{a}}}{{{b}}} + {b}y = {a + b} \\). Wait, let me check that again.\n"

    def ids(self, count: int) -> list[int]:
        """Tokens of so much reasoning."""
        ids: list[int] = []
        while len(ids) < count:
            ids += self._tokenizer("".join(self._step() for _ in range(8)))["input_ids"]
        return ids[:count]

    def ending(self, count: int, closed: bool) -> list[int]:
        """Tokens of the end of a response, with an answer."""
        value = self._random.randrange(1000)
        last = (
            f"\n</think>\n<answer>\\boxed{{{value}}}</answer>" if closed else f"\nThen $ {value} = {value} $ and so on"
        )
        ids = self._tokenizer(last)["input_ids"][-count:]
        return [*self.ids(count - len(ids)), *ids]

    def questions(self, count: int) -> list[dict[str, str]]:
        """Questions of some 150 tokens."""
        return [
            {"question": f"{i}. {self._step()}{self._step()}{self._step()}"[:560], "answer": str(i)}
            for i in range(count)
        ]
