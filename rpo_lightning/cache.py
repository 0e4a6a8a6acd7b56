"""The experience cache: what is remembered of every question. Knows nothing of Lightning.

One :class:`CacheEntry` per question holds at most one response, as token ids (the published code
keeps text, which drifts when it is encoded again), with the reward it got and the update each of its
tokens was generated at. What a cut strategy wants to remember of a question lies in ``state`` and is
saved with the entry.

On disk a cache is one Parquet file, a row per question, with the tokenizer's fingerprint in the
schema's metadata. In a checkpoint it is a dictionary of tensors and primitives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rpo_lightning.errors import CacheError
from rpo_lightning.files import replacing
from rpo_lightning.records import Spans

FORMAT_VERSION = 1
# The "update" at which tokens that came from elsewhere were generated.
IMPORTED_STEP = -1


@dataclass(frozen=True)
class CachedResponse:
    """A response that later visits of its question are cut from.

    Attributes:
        token_ids: The whole response, int32, the end-of-sequence token included if it was sampled.
        reward: The total reward it got.
        correct: Whether the verifier accepted it.
        finished: Whether it ended by itself.
        spans: ``(step, count)`` runs: at which update its tokens were generated, in order; -1 for those that
            came from elsewhere.
    """

    token_ids: np.ndarray
    reward: float
    correct: bool
    finished: bool
    spans: Spans

    @property
    def step(self) -> int:
        """The update at which its newest tokens were generated."""
        return self.spans[-1][0] if self.spans else 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class CacheEntry:
    """What is remembered of one question.

    Attributes:
        uid: The question.
        response: The cached response, if there is one.
        visits: Groups that were sampled for the question.
        restart: Whether the next visit starts without a prefix.
        state: What the cut strategy remembers of the question (JSON values, saved with the entry).
    """

    uid: str
    response: CachedResponse | None = None
    visits: int = 0
    restart: bool = False
    state: dict[str, Any] = field(default_factory=dict)


class ExperienceCache:
    """Entries by question uid.

    Args:
        tokenizer_fingerprint: Identifies the vocabulary that the token ids belong to.
    """

    def __init__(self, tokenizer_fingerprint: str) -> None:
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._entries: dict[str, CacheEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter(self._entries.values())

    def __contains__(self, uid: object) -> bool:
        return uid in self._entries

    def get(self, uid: str) -> CacheEntry | None:
        """The entry of a question, or ``None`` before its first visit."""
        return self._entries.get(uid)

    def entry(self, uid: str) -> CacheEntry:
        """The entry of a question, made if there is none."""
        if uid not in self._entries:
            self._entries[uid] = CacheEntry(uid)
        return self._entries[uid]

    def statistics(self, step: int) -> dict[str, float]:
        """Health of the cache at update ``step``.

        Returns:
            ``entries`` and ``responses`` (counts), and over the responses: ``correct_share``, mean
            ``length``, mean ``age`` (updates since the newest tokens), and ``initial_token_share``,
            the share of tokens that were there before the first update, from the starting policy or elsewhere.
        """
        responses = [e.response for e in self if e.response is not None]
        result = {"entries": float(len(self)), "responses": float(len(responses))}
        if responses:
            tokens = sum(len(r) for r in responses)
            initial = sum(count for r in responses for made_at, count in r.spans if made_at <= 0)
            result |= {
                "correct_share": sum(r.correct for r in responses) / len(responses),
                "length": tokens / len(responses),
                "age": sum(step - max(r.step, 0) for r in responses) / len(responses),
                "initial_token_share": initial / max(tokens, 1),
            }
        return result

    def forget_updates(self) -> None:
        """Have all tokens come from elsewhere: update numbers of another run mean nothing in this one."""
        for entry in self:
            if entry.response is not None:
                entry.response = replace(entry.response, spans=((IMPORTED_STEP, len(entry.response)),))

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole cache as tensors and primitives (``torch.load(weights_only=True)`` reads it)."""
        entries = list(self)
        responses = [e.response for e in entries]
        ids = [r.token_ids for r in responses if r is not None]
        return {
            "version": FORMAT_VERSION,
            "tokenizer": self.tokenizer_fingerprint,
            "uids": [e.uid for e in entries],
            "visits": torch.tensor([e.visits for e in entries], dtype=torch.int64),
            "restart": torch.tensor([e.restart for e in entries], dtype=torch.bool),
            "state": [json.dumps(e.state) if e.state else "" for e in entries],
            "lengths": torch.tensor([-1 if r is None else len(r) for r in responses], dtype=torch.int64),
            "token_ids": torch.from_numpy(np.concatenate(ids) if ids else np.zeros(0, np.int32)),
            "rewards": torch.tensor([0.0 if r is None else r.reward for r in responses], dtype=torch.float64),
            "correct": torch.tensor([r is not None and r.correct for r in responses], dtype=torch.bool),
            "finished": torch.tensor([r is not None and r.finished for r in responses], dtype=torch.bool),
            "spans": [[] if r is None else [list(span) for span in r.spans] for r in responses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a saved state.

        Raises:
            CacheError: The state is of another version or tokenizer.
        """
        self._require_same_origin(state["version"], state["tokenizer"], "the checkpoint's cache")
        self._entries = {}
        token_ids = state["token_ids"].numpy()
        offset = 0
        for i, uid in enumerate(state["uids"]):
            length = int(state["lengths"][i])
            response = None
            if length >= 0:
                response = CachedResponse(
                    token_ids=token_ids[offset : offset + length].copy(),
                    reward=float(state["rewards"][i]),
                    correct=bool(state["correct"][i]),
                    finished=bool(state["finished"][i]),
                    spans=tuple((int(s), int(n)) for s, n in state["spans"][i]),
                )
                offset += length
            self._entries[uid] = CacheEntry(
                uid=uid,
                response=response,
                visits=int(state["visits"][i]),
                restart=bool(state["restart"][i]),
                state=json.loads(state["state"][i]) if state["state"][i] else {},
            )

    def save(self, path: str | Path) -> None:
        """Write the cache as a Parquet file, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        state = self.state_dict()
        responses = [e.response for e in self]
        table = pa.table(
            {
                "uid": pa.array(state["uids"], pa.string()),
                "token_ids": pa.array([None if r is None else r.token_ids for r in responses], pa.list_(pa.int32())),
                "reward": pa.array(state["rewards"].numpy()),
                "correct": pa.array(state["correct"].numpy()),
                "finished": pa.array(state["finished"].numpy()),
                "spans": pa.array(state["spans"], pa.list_(pa.list_(pa.int64()))),
                "visits": pa.array(state["visits"].numpy()),
                "restart": pa.array(state["restart"].numpy()),
                "state": pa.array(state["state"], pa.string()),
            }
        ).replace_schema_metadata({"version": str(FORMAT_VERSION), "tokenizer": self.tokenizer_fingerprint})
        with replacing(path) as partial:
            pq.write_table(table, partial)

    def load(self, path: str | Path) -> None:
        """Replace the contents by a saved file.

        Raises:
            CacheError: The file is missing, is no cache, or belongs to another tokenizer.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise CacheError(f"{path}: no such cache file")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise CacheError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        metadata = table.schema.metadata or {}
        if b"tokenizer" not in metadata or "token_ids" not in table.column_names:
            raise CacheError(f"{path}: not an experience cache (no tokenizer fingerprint in its metadata)")
        self._require_same_origin(int(metadata[b"version"]), metadata[b"tokenizer"].decode(), str(path))
        self._entries = {}
        for row in table.to_pylist():
            response = None
            if row["token_ids"] is not None:
                response = CachedResponse(
                    token_ids=np.asarray(row["token_ids"], dtype=np.int32),
                    reward=row["reward"],
                    correct=row["correct"],
                    finished=row["finished"],
                    spans=tuple((s, n) for s, n in row["spans"]),
                )
            self._entries[row["uid"]] = CacheEntry(
                row["uid"], response, row["visits"], row["restart"], json.loads(row["state"]) if row["state"] else {}
            )

    def _require_same_origin(self, version: int, tokenizer: str, where: str) -> None:
        if version != FORMAT_VERSION:
            raise CacheError(f"{where}: cache format {version}, this release reads format {FORMAT_VERSION}")
        if tokenizer != self.tokenizer_fingerprint:
            raise CacheError(
                f"{where}: made with another tokenizer (fingerprint {tokenizer}, this policy's is "
                f"{self.tokenizer_fingerprint}): token ids would mean other text; build a new cache"
            )


def extend_spans(prefix_spans: Spans, suffix_length: int, step: int) -> Spans:
    """Spans of a prefix followed by ``suffix_length`` tokens generated at ``step``."""
    spans = list(prefix_spans)
    if suffix_length:
        if spans and spans[-1][0] == step:
            spans[-1] = (step, spans[-1][1] + suffix_length)
        else:
            spans.append((step, suffix_length))
    return tuple(spans)


def cut_spans(spans: Spans, kept: int) -> Spans:
    """Spans of the first ``kept`` tokens."""
    result = []
    for step, count in spans:
        if kept <= 0:
            break
        result.append((step, min(count, kept)))
        kept -= count
    return tuple(result)
