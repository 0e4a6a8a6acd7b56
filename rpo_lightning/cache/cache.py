"""The experience cache: one entry for each question, with at most one response.

A response is held as token ids, with its reward and the update at which each token was generated. Deviation: the
paper's code holds text, whose token ids change when it is encoded again. A cut strategy keeps its own notes on a
question in ``state``, which is saved with the entry.

Data is held in columns: a million questions take little more memory than their token ids
(:mod:`rpo_lightning.cache.token_blocks`). :class:`CacheEntry` and :class:`CachedResponse` are views of one row.

On disk a cache is a Parquet file with a row for each question (:mod:`rpo_lightning.cache.parquet`). In a checkpoint it
is a dictionary of tensors and primitives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rpo_lightning.cache.spans import flat_spans, initial_tokens, nested_spans, newest_step
from rpo_lightning.cache.token_blocks import TokenBlocks
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.types import Spans

FORMAT_VERSION = 2
# Step of tokens that this run did not generate.
IMPORTED_STEP = -1

# Columns besides tokens, spans and state. "step" and "initial_tokens" are computed from the spans and not saved.
_FACTS = np.dtype(
    [
        ("visits", np.int64),
        ("restart", np.bool_),
        ("reward", np.float64),
        ("correct", np.bool_),
        ("finished", np.bool_),
        ("step", np.int64),
        ("initial_tokens", np.int64),
    ]
)
_SAVED_FACTS = ("visits", "restart", "reward", "correct", "finished")


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """The response from which a question's prefixes are cut.

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

    def __len__(self) -> int:
        return len(self.token_ids)


class CacheEntry:
    """One question's row of a cache. Reads and writes go to the cache."""

    __slots__ = ("_cache", "_number", "uid")

    def __init__(self, cache: ExperienceCache, uid: str, number: int) -> None:
        self.uid = uid
        self._cache = cache
        self._number = number

    @property
    def response(self) -> CachedResponse | None:
        """The cached response, or ``None``. :meth:`ExperienceCache.remember` replaces it."""
        return self._cache._response(self._number)

    @property
    def visits(self) -> int:
        """How many groups were sampled for the question."""
        return int(self._cache._facts["visits"][self._number])

    @visits.setter
    def visits(self, value: int) -> None:
        self._cache._facts["visits"][self._number] = value

    @property
    def restart(self) -> bool:
        """Whether the next visit takes the full path."""
        return bool(self._cache._facts["restart"][self._number])

    @restart.setter
    def restart(self, value: bool) -> None:
        self._cache._facts["restart"][self._number] = value

    @property
    def state(self) -> dict[str, Any]:
        """The cut strategy's notes on the question: JSON values, saved with the entry."""
        return self._cache._states.setdefault(self._number, {})

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._cache._states[self._number] = value


class ExperienceCache:
    """Entries by question uid, in the order of their first visits.

    Args:
        tokenizer_fingerprint: Identifies the tokenizer of the token ids.
    """

    def __init__(self, tokenizer_fingerprint: str) -> None:
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._numbers: dict[str, int] = {}  # row numbers 0, 1, 2, …
        self._facts = np.zeros(0, _FACTS)
        self._tokens = TokenBlocks()
        self._spans: list[Spans] = []
        self._states: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[CacheEntry]:
        return (CacheEntry(self, uid, number) for uid, number in self._numbers.items())

    def __contains__(self, uid: object) -> bool:
        return uid in self._numbers

    def get(self, uid: str) -> CacheEntry | None:
        """The entry of a question, or ``None`` if there is none."""
        number = self._numbers.get(uid)
        return None if number is None else CacheEntry(self, uid, number)

    def entry(self, uid: str) -> CacheEntry:
        """The entry of a question. Makes one if there is none."""
        return CacheEntry(self, uid, self._number(uid))

    def remember(self, uid: str, response: CachedResponse) -> None:
        """Cache a response in place of the question's earlier one. Copies the tokens."""
        number = self._number(uid)
        self._tokens[number] = response.token_ids
        row = self._facts[number]
        row["reward"], row["correct"], row["finished"] = response.reward, response.correct, response.finished
        row["step"] = response.step
        row["initial_tokens"] = initial_tokens(response.spans)
        self._spans[number] = response.spans

    def statistics(self, step: int) -> dict[str, float]:
        """Health of the cache at update ``step``.

        Returns:
            The counts ``entries`` and ``responses``; over the responses, ``correct_share``, mean ``length`` in tokens,
            mean ``age`` (updates since the last tokens were generated), and ``initial_token_share`` (share of tokens
            from before the first update, imported ones included).
        """
        # Rows without a response hold zeros, so whole columns can be summed.
        facts, tokens = self._facts[: len(self)], self._tokens.live_tokens
        responses = len(self._tokens)
        result = {"entries": float(len(self)), "responses": float(responses)}
        if responses:
            result |= {
                "correct_share": float(facts["correct"].sum() / responses),
                "length": tokens / responses,
                "age": float(step - np.maximum(facts["step"], 0).sum() / responses),
                "initial_token_share": float(facts["initial_tokens"].sum() / max(tokens, 1)),
            }
        return result

    def forget_updates(self) -> None:
        """Mark all tokens as imported. Call it for a cache of another run, whose update numbers mean nothing here."""
        for number, length in enumerate(self._tokens.lengths(len(self)).tolist()):
            if length >= 0:
                self._spans[number] = ((IMPORTED_STEP, length),)
                self._facts["step"][number], self._facts["initial_tokens"][number] = IMPORTED_STEP, length

    def _number(self, uid: str) -> int:
        number = self._numbers.setdefault(uid, len(self._numbers))
        if number == len(self._spans):
            self._spans.append(())
            if number == len(self._facts):
                facts = np.zeros(max(2 * number, 1024), _FACTS)
                facts[:number] = self._facts
                self._facts = facts
        return number

    def _response(self, number: int) -> CachedResponse | None:
        if number not in self._tokens:
            return None
        _, _, reward, correct, finished, _, _ = self._facts[number].item()
        return CachedResponse(self._tokens[number], reward, correct, finished, self._spans[number])

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole cache as tensors and primitives, which ``torch.load(weights_only=True)`` reads.

        Tokens are not copied. The state shares the cache's blocks, whose written part never changes.
        """
        facts = self._facts[: len(self)]
        span_counts, spans = flat_spans(self._spans)
        return {
            "version": FORMAT_VERSION,
            "tokenizer": self.tokenizer_fingerprint,
            # One JSON text each: pickle would hold a million small strings in its memo while it writes.
            "uids": json.dumps(list(self._numbers)),
            "states": json.dumps({number: state for number, state in self._states.items() if state}),
            "facts": {name: torch.from_numpy(facts[name].copy()) for name in _SAVED_FACTS},
            "tokens": self._tokens.state_dict(),
            "span_counts": torch.from_numpy(span_counts),
            "spans": torch.from_numpy(spans),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a saved state. Shares the state's tokens without a copy.

        Raises:
            CacheError: The state has another format version or tokenizer.
        """
        self.require_same_origin(state["version"], state["tokenizer"], "the checkpoint's cache")
        uids = json.loads(state["uids"])
        loaded = ExperienceCache(self.tokenizer_fingerprint)
        loaded._numbers = {uid: number for number, uid in enumerate(uids)}
        loaded._states = {int(number): of_entry for number, of_entry in json.loads(state["states"]).items()}
        loaded._spans = nested_spans(state["span_counts"].numpy(), state["spans"].numpy())
        loaded._tokens.load_state_dict(state["tokens"])
        loaded._facts = np.zeros(len(uids), _FACTS)
        for name in _SAVED_FACTS:
            loaded._facts[name] = state["facts"][name].numpy()
        loaded._facts["step"] = [newest_step(spans) for spans in loaded._spans]
        loaded._facts["initial_tokens"] = [initial_tokens(spans) for spans in loaded._spans]
        vars(self).update(vars(loaded))

    def require_same_origin(self, version: int, tokenizer: str, where: str) -> None:
        """Check that a saved cache has this release's format and this policy's tokenizer.

        Args:
            version: Format version of what was saved.
            tokenizer: Its tokenizer fingerprint.
            where: What to call it in the message.

        Raises:
            CacheError: It has another format version or tokenizer.
        """
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{where}: cache format {version}, this release reads format {FORMAT_VERSION}: build a new cache"
            )
        if tokenizer != self.tokenizer_fingerprint:
            raise CacheError(
                f"{where}: made with another tokenizer (fingerprint {tokenizer}, this policy's is "
                f"{self.tokenizer_fingerprint}), so its token ids mean other text: build a new cache"
            )
