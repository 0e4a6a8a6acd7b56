"""Rows of a cache file, checked and put into a cache."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.soundness import MOST_SLOTS, read_notes, response_problem
from rpo_lightning.cache.spans import nested_spans
from rpo_lightning.core.errors import CacheError


class FileRows:
    """A batch of rows of a file.

    Args:
        batch: The rows.
        first: Number of the first one.
        path: The file, for messages.
    """

    def __init__(self, batch: pa.RecordBatch, first: int, path: str) -> None:
        self._column = {name: batch.column(name) for name in batch.schema.names}
        self._first = first
        self._path = path

    def put_into(self, cache: ExperienceCache) -> None:
        """Add the rows to a cache.

        Raises:
            CacheError: A row cannot be one.
        """
        tokens, spans = self._column["token_ids"], self._column["spans"]
        for name, array in {**self._column, "token_ids": tokens.values, "spans": spans.flatten()}.items():
            if array.null_count:
                raise CacheError(
                    f"{self._path}: {array.null_count} empty values in its column {name!r}: build a new cache"
                )
        ids, lengths = tokens.flatten().to_numpy(), tokens.value_lengths().fill_null(-1).to_numpy()
        counts, flat = spans.value_lengths().fill_null(0).to_numpy(), spans.flatten()
        runs = np.stack([flat.field("step").to_numpy(), flat.field("count").to_numpy()], axis=1)
        rewards = self._column["reward"].to_numpy()
        problem = response_problem(ids, lengths, rewards, counts, runs, cache.vocabulary_size)
        if problem is not None:
            self._refuse(*problem)
        starts = np.cumsum(np.maximum(lengths, 0)) - np.maximum(lengths, 0)
        many_spans = nested_spans(counts, runs)
        names = ("uid", "visits", "restart", "correct", "finished", "state")
        rows = zip(*(self._column[name].to_pylist() for name in names), strict=True)
        slots = self._column["slot"].to_pylist() if "slot" in self._column else [0] * len(lengths)
        for i, (uid, visits, restart, correct, finished, state) in enumerate(rows):
            self._require_place(cache, i, uid, slots[i])
            if slots[i] == 0:
                entry = cache.entry(uid)
                entry.visits, entry.restart = self._visits(i, visits), restart
                if state:
                    entry.state = self._notes(i, state)
            if lengths[i] >= 0:
                response_ids = ids[starts[i] : starts[i] + lengths[i]]
                response = CachedResponse(response_ids, float(rewards[i]), correct, finished, many_spans[i])
                cache.remember(uid, response, slots[i])

    def _require_place(self, cache: ExperienceCache, row: int, uid: str, slot: int) -> None:
        """Check that a row's question and slot are its own."""
        entry = cache.get(uid)
        if not 0 <= slot < MOST_SLOTS:
            self._refuse(row, f"slot {slot}, slots are numbered from 0 to {MOST_SLOTS - 1}")
        if slot and entry is None:
            self._refuse(row, f"its question has no row of slot 0 before that of slot {slot}")
        if entry is not None and (slot == 0 or (slot < len(entry.slots) and entry.slots[slot] is not None)):
            self._refuse(row, "its question has a row before it")

    def _visits(self, row: int, visits: int) -> int:
        if visits < 0:
            self._refuse(row, f"{visits} visits")
        return visits

    def _notes(self, row: int, state: str) -> dict[str, Any]:
        try:
            return read_notes(state)
        except ValueError as error:
            return self._refuse(row, f"its state cannot be used ({error})")

    def _refuse(self, row: int, problem: str) -> NoReturn:
        uid = str(self._column["uid"][row].as_py())[:40]
        raise CacheError(f"{self._path}, row {self._first + row} (question {uid!r}): {problem}: build a new cache")
