"""The experience cache: one entry for each question, with the responses from which its prefixes are cut.

A response is held as token ids, with its reward and the update at which each token was generated. Deviation: the
paper's code holds text, whose token ids change when it is encoded again. The paper has one response for each question.
With a refresh rule that keeps several, a question has *slots* 0, 1, 2, …, each with at most one response (an *anchor*).

A cut strategy keeps its notes on a question in the entry's ``state``, and those on all questions in the cache's
``shared``. Both are saved with the cache.

Data is held in columns: a million questions take little more memory than their token ids
(``rpo_lightning.cache.token_blocks``). Every slot has columns of its own (``rpo_lightning.cache.responses``), so
slots that nobody uses cost nothing. ``CacheEntry`` and ``CachedResponse`` are views of one row.

On disk a cache is a Parquet file with a row for each question and further slot (``rpo_lightning.cache.parquet``). In
a checkpoint it is a dictionary of tensors and primitives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from rpo_lightning.cache.responses import IMPORTED_STEP, CachedResponse, ResponseColumns
from rpo_lightning.cache.soundness import (
    FORMAT_VERSION,
    MOST_SLOTS,
    array_of,
    read_notes,
    reading_state,
    require_same_origin,
)
from rpo_lightning.core.errors import CacheError

__all__ = ["FORMAT_VERSION", "IMPORTED_STEP", "CacheEntry", "CachedResponse", "ExperienceCache"]

# Columns of the questions.
_VISITS = np.dtype([("visits", np.int64), ("restart", np.bool_)])


class CacheEntry:
    """One question's row of a cache. Reads and writes go to the cache."""

    __slots__ = ("_cache", "_number", "uid")

    def __init__(self, cache: ExperienceCache, uid: str, number: int) -> None:
        self.uid = uid
        self._cache = cache
        self._number = number

    @property
    def response(self) -> CachedResponse | None:
        """The response in slot 0, or ``None``. ``ExperienceCache.remember`` replaces it."""
        columns = self._cache._slots[0]
        return columns.get(self._number)

    @property
    def slots(self) -> list[CachedResponse | None]:
        """What each slot of the cache holds."""
        return [columns.get(self._number) for columns in self._cache._slots]

    @property
    def anchors(self) -> list[CachedResponse]:
        """All cached responses of the question, in the order of their slots."""
        return [response for response in self.slots if response is not None]

    @property
    def has_anchor(self) -> bool:
        """Whether any slot holds a response."""
        return self._cache.has_anchor(self.uid)

    @property
    def first_correct(self) -> CachedResponse | None:
        """The correct response in the first slot that holds one, or ``None``."""
        return next((anchor for anchor in self.anchors if anchor.correct), None)

    def remember(self, response: CachedResponse, slot: int = 0) -> None:
        """Cache a response; see ``ExperienceCache.remember``."""
        self._cache.remember(self.uid, response, slot)

    @property
    def visits(self) -> int:
        """How many groups were sampled for the question."""
        return int(self._cache._visits["visits"][self._number])

    @visits.setter
    def visits(self, value: int) -> None:
        self._cache._visits["visits"][self._number] = value

    @property
    def restart(self) -> bool:
        """Whether the next visit takes the full path."""
        return bool(self._cache._visits["restart"][self._number])

    @restart.setter
    def restart(self, value: bool) -> None:
        self._cache._visits["restart"][self._number] = value

    @property
    def state(self) -> dict[str, Any]:
        """The cut strategy's notes on the question: JSON values, saved with the entry."""
        return self._cache._states.setdefault(self._number, {})

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._cache._states[self._number] = value

    @property
    def shared(self) -> dict[str, Any]:
        """The cut strategy's notes on all questions: ``ExperienceCache.shared``."""
        return self._cache.shared


class ExperienceCache:
    """Entries by question uid, in the order of their first visits.

    Args:
        tokenizer_fingerprint: Identifies the tokenizer of the token ids.
        vocabulary_size: Token ids that are loaded lie below it; ``None`` if that is not known.

    Attributes:
        shared: The cut strategy's notes on all questions: JSON values, saved with the cache.
    """

    def __init__(self, tokenizer_fingerprint: str, vocabulary_size: int | None = None) -> None:
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.vocabulary_size = vocabulary_size
        self.shared: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}  # row numbers 0, 1, 2, …
        self._visits = np.zeros(0, _VISITS)
        self._slots = [ResponseColumns()]
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

    def has_anchor(self, uid: str) -> bool:
        """Whether any slot holds a response to a question."""
        number = self._numbers.get(uid)
        return number is not None and any(number in columns for columns in self._slots)

    def entry(self, uid: str) -> CacheEntry:
        """The entry of a question. Makes one if there is none."""
        return CacheEntry(self, uid, self._number(uid))

    def remember(self, uid: str, response: CachedResponse, slot: int = 0) -> None:
        """Cache a response in place of the one that the question had in the slot. Copies the tokens.

        Raises:
            CacheError: There is no such slot.
        """
        if not 0 <= slot < MOST_SLOTS:
            raise CacheError(f"question {uid}: slot {slot}, slots are numbered from 0 to {MOST_SLOTS - 1}")
        number = self._number(uid)
        while slot >= len(self._slots):
            self._slots.append(ResponseColumns())
        self._slots[slot][number] = response

    def statistics(self, step: int) -> dict[str, float]:
        """Health of the cache at update ``step``.

        Returns:
            The counts ``entries`` and ``responses``; over the responses of all slots, ``correct_share``, mean
            ``length`` in tokens, mean ``age`` (updates since the last tokens were generated), and
            ``initial_token_share`` (share of tokens from before the first update, imported ones included).
        """
        responses = sum(len(columns) for columns in self._slots)
        result = {"entries": float(len(self)), "responses": float(responses)}
        if responses:
            of_slots = [columns.sums() for columns in self._slots]
            sums = {name: sum(of_slot[name] for of_slot in of_slots) for name in of_slots[0]}
            result |= {
                "correct_share": sums["correct"] / responses,
                "length": sums["tokens"] / responses,
                "age": step - sums["steps"] / responses,
                "initial_token_share": sums["initial_tokens"] / max(sums["tokens"], 1),
            }
        return result

    def forget_updates(self) -> None:
        """Mark all tokens as imported. Call it for a cache of another run, whose update numbers mean nothing here."""
        for columns in self._slots:
            columns.forget_updates()

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The cut strategy's notes by question, of the questions that have any."""
        return ((uid, self._states[number]) for uid, number in self._numbers.items() if self._states.get(number))

    def _number(self, uid: str) -> int:
        number = self._numbers.setdefault(uid, len(self._numbers))
        if number >= len(self._visits):
            visits = np.zeros(max(2 * number, 1024), _VISITS)
            visits[: len(self._visits)] = self._visits
            self._visits = visits
        return number

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole cache as tensors and primitives, which ``torch.load(weights_only=True)`` reads.

        Tokens are not copied. The state shares the cache's blocks, whose written part never changes.
        """
        visits = self._visits[: len(self)]
        return {
            "version": FORMAT_VERSION,
            "tokenizer": self.tokenizer_fingerprint,
            # One JSON text each: pickle would hold a million small strings in its memo while it writes.
            "uids": json.dumps(list(self._numbers)),
            "states": json.dumps({number: state for number, state in self._states.items() if state}),
            "shared": json.dumps(self.shared),
            "visits": {name: torch.from_numpy(visits[name].copy()) for name in _VISITS.names or ()},
            "slots": [columns.state_dict() for columns in self._slots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a saved state. Shares the state's tokens without a copy.

        Raises:
            CacheError: The state has another format version or tokenizer, or is damaged. The contents stay.
        """
        with reading_state():
            loaded = self._loaded(state)
        vars(self).update(vars(loaded))

    def _loaded(self, state: Mapping[str, Any]) -> ExperienceCache:
        require_same_origin(state["version"], state["tokenizer"], self.tokenizer_fingerprint, "the checkpoint's cache")
        if state["version"] == 2:  # it names the columns of its only slot without one
            state = {**state, "shared": "{}", "visits": state["facts"], "slots": [state]}
        loaded = ExperienceCache(self.tokenizer_fingerprint, self.vocabulary_size)
        uids = json.loads(state["uids"])
        loaded._numbers = {uid: number for number, uid in enumerate(uids)}
        if len(loaded) != len(uids) or not all(isinstance(uid, str) for uid in uids):
            raise ValueError("a question comes twice, or has no text as its uid")
        of_entries = read_notes(state["states"]).items()
        loaded._states = {int(number): read_notes(json.dumps(of_entry)) for number, of_entry in of_entries}
        loaded.shared = read_notes(state["shared"])
        loaded._visits = np.zeros(len(loaded), _VISITS)
        for name in _VISITS.names or ():
            loaded._visits[name] = array_of(state["visits"][name], _VISITS[name].type, (len(loaded),))
        if loaded._visits["visits"].min(initial=0) < 0 or len(state["slots"]) > MOST_SLOTS:
            raise ValueError("a question has fewer than 0 visits, or there are too many slots")
        loaded._slots = [ResponseColumns() for _ in state["slots"]]
        for columns, of_slot in zip(loaded._slots, state["slots"], strict=True):
            columns.load_state_dict(of_slot, len(loaded), self.vocabulary_size)
        return loaded
