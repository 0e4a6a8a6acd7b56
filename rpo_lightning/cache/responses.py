"""Cached responses, and the columns that hold them: at most one response for each row number.

Facts lie in a structured array, token ids in blocks (``rpo_lightning.cache.token_blocks``). A cache has a set of
columns for each of its slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rpo_lightning.cache.soundness import array_of, response_problem
from rpo_lightning.cache.spans import flat_spans, initial_tokens, nested_spans, newest_step
from rpo_lightning.cache.token_blocks import TokenBlocks
from rpo_lightning.core.types import Spans

# Step of tokens that this run did not generate.
IMPORTED_STEP = -1

# "step" and "initial_tokens" are computed from the spans and not saved.
_FACTS = np.dtype(
    [
        ("reward", np.float64),
        ("correct", np.bool_),
        ("finished", np.bool_),
        ("step", np.int64),
        ("initial_tokens", np.int64),
    ]
)
_SAVED_FACTS = ("reward", "correct", "finished")


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A response from which a question's prefixes are cut.

    Attributes:
        token_ids: The whole response, int32, with the end-of-sequence token if it was sampled.
        reward: Its total reward.
        correct: Whether the verifier accepted it.
        finished: Whether it ended by itself, not by its budget.
        spans: ``(step, count)`` runs, in order: ``count`` tokens were generated at update ``step``; -1 if this run
            did not generate them.
    """

    token_ids: np.ndarray
    reward: float
    correct: bool
    finished: bool
    spans: Spans

    @property
    def step(self) -> int:
        """The update at which its last tokens were generated."""
        return newest_step(self.spans)

    @property
    def is_own(self) -> bool:
        """Whether this run generated all of its tokens."""
        return all(step != IMPORTED_STEP for step, _ in self.spans)

    @property
    def is_trace(self) -> bool:
        """Whether it is a correct response that comes from elsewhere as a whole."""
        return self.correct and all(step == IMPORTED_STEP for step, _ in self.spans)

    def __len__(self) -> int:
        return len(self.token_ids)


class ResponseColumns:
    """Responses by row number 0, 1, 2, …, in columns. Memory grows with the largest number."""

    def __init__(self) -> None:
        self._facts = np.zeros(0, _FACTS)
        self._tokens = TokenBlocks()
        self._spans: list[Spans] = []

    def __len__(self) -> int:
        """How many numbers have a response."""
        return len(self._tokens)

    def __contains__(self, number: int) -> bool:
        return number in self._tokens

    def get(self, number: int) -> CachedResponse | None:
        """The response of a number, or ``None`` if it has none."""
        if number not in self._tokens:
            return None
        reward, correct, finished, _, _ = self._facts[number].item()
        return CachedResponse(self._tokens[number], reward, correct, finished, self._spans[number])

    def __setitem__(self, number: int, response: CachedResponse) -> None:
        """Store a response in place of the number's earlier one. Copies the tokens."""
        self._make_room(number)
        self._tokens[number] = response.token_ids
        self._facts[number] = (
            response.reward, response.correct, response.finished, response.step, initial_tokens(response.spans)
        )  # fmt: skip
        self._spans[number] = response.spans

    def sums(self) -> dict[str, int]:
        """Sums over the responses: tokens, correct ones, newest steps from 0 on, and initial tokens."""
        # Numbers without a response hold zeros, so whole columns can be summed.
        facts = self._facts[: len(self._spans)]
        return {
            "tokens": self._tokens.live_tokens,
            "correct": int(facts["correct"].sum()),
            "steps": int(np.maximum(facts["step"], 0).sum()),
            "initial_tokens": int(facts["initial_tokens"].sum()),
        }

    def forget_updates(self) -> None:
        """Mark all tokens as imported."""
        for number, length in enumerate(self._tokens.lengths(len(self._spans)).tolist()):
            if length >= 0:
                self._spans[number] = ((IMPORTED_STEP, length),)
                self._facts["step"][number], self._facts["initial_tokens"][number] = IMPORTED_STEP, length

    def _make_room(self, number: int) -> None:
        if number >= len(self._facts):
            facts = np.zeros(max(2 * len(self._facts), number + 1, 1024), _FACTS)
            facts[: len(self._facts)] = self._facts
            self._facts = facts
        while number >= len(self._spans):
            self._spans.append(())

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All responses as tensors. Shares the blocks of tokens, whose written part never changes."""
        facts = self._facts[: len(self._spans)]
        span_counts, spans = flat_spans(self._spans)
        return {
            "facts": {name: torch.from_numpy(facts[name].copy()) for name in _SAVED_FACTS},
            "tokens": self._tokens.state_dict(),
            "span_counts": torch.from_numpy(span_counts),
            "spans": torch.from_numpy(spans),
        }

    def load_state_dict(self, state: Mapping[str, Any], most: int, vocabulary_size: int | None) -> None:
        """Replace the contents by a saved state. Shares the state's tokens without a copy.

        Args:
            state: What ``state_dict`` returned.
            most: How many rows there can be.
            vocabulary_size: Token ids lie below it; ``None`` if that is not known.

        Raises:
            CacheError: Tokens are missing.
            ValueError: A part cannot be one.
        """
        counts = array_of(state["span_counts"], np.int64, (None,))
        runs = array_of(state["spans"], np.int64, (None, 2))
        if len(counts) > most or counts.min(initial=0) < 0 or counts.sum() != len(runs):
            raise ValueError("its spans are not those of its questions")
        self._tokens.load_state_dict(state["tokens"], len(counts), vocabulary_size)
        self._facts = np.zeros(len(counts), _FACTS)
        for name in _SAVED_FACTS:
            self._facts[name] = array_of(state["facts"][name], _FACTS[name].type, (len(counts),))
        lengths = self._tokens.lengths(len(counts))
        problem = response_problem(np.zeros(0, np.int32), lengths, self._facts["reward"], counts, runs)
        if problem is not None:
            raise ValueError(f"question number {problem[0] + 1}: {problem[1]}")
        self._spans = nested_spans(counts, runs)
        self._facts["step"] = [newest_step(spans) for spans in self._spans]
        self._facts["initial_tokens"] = [initial_tokens(spans) for spans in self._spans]
