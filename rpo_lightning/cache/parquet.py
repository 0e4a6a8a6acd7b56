"""Reading and writing experience caches as Parquet files.

A file has a row for each question, with what slot 0 holds, and one for each response in a further slot. The schema's
metadata hold the format version, the tokenizer fingerprint, and the cut strategy's notes on all questions. Files are
read and written in batches of rows: besides the cache itself, only one batch is in memory. Every page has a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.file_rows import FileRows
from rpo_lightning.cache.soundness import FORMAT_VERSION, read_notes, require_same_origin
from rpo_lightning.cache.spans import flat_spans
from rpo_lightning.core.declared_size import require_room
from rpo_lightning.core.errors import CacheError, one_line
from rpo_lightning.core.files import replacing

# Limits of a batch. Arrow needs several times a batch's bytes while it works.
BATCH_TOKENS, BATCH_ROWS = 2**20, 512

SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "slot": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "reward": pa.float64(),
        "correct": pa.bool_(),
        "finished": pa.bool_(),
        "spans": pa.list_(pa.struct({"step": pa.int64(), "count": pa.int64()})),
        "visits": pa.int64(),
        "restart": pa.bool_(),
        "state": pa.string(),
    }
)

# Of format 2, whose responses are all in slot 0.
_SCHEMAS = {2: pa.schema([field for field in SCHEMA if field.name != "slot"]), FORMAT_VERSION: SCHEMA}

# What Arrow, and the decoding of metadata, raise for a damaged file.
_DAMAGED = (pa.ArrowException, OSError, ValueError, KeyError)

_Row = tuple[CacheEntry, int, CachedResponse | None]


def write_cache(cache: ExperienceCache, path: str | Path, filling: Mapping[str, Any] | None = None) -> None:
    """Write a cache. If writing fails, an earlier file at ``path`` stays as it was.

    Args:
        cache: The cache.
        path: The file.
        filling: How far a cache is that is still being filled: JSON values, which ``filling_of`` returns.
    """
    metadata = {
        "version": str(FORMAT_VERSION),
        "tokenizer": cache.tokenizer_fingerprint,
        "shared": json.dumps(cache.shared),
    }
    if filling is not None:
        metadata["filling"] = json.dumps(filling)
    schema = SCHEMA.with_metadata(metadata)
    with replacing(path) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for rows in _batches(cache):
            writer.write_batch(_as_batch(rows, schema))
    _give_memory_back()


def read_cache(path: str | Path, tokenizer_fingerprint: str, vocabulary_size: int | None = None) -> ExperienceCache:
    """Read a cache. The file may come from elsewhere: all of it is checked.

    Args:
        path: The file.
        tokenizer_fingerprint: The fingerprint of the policy's tokenizer.
        vocabulary_size: Token ids must lie below it; not checked if not given.

    Raises:
        CacheError: The file is missing or damaged, is not a cache, or has another format version or tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        is_folder = f"{path}: a folder: name the cache file in it"
        raise CacheError(is_folder if path.is_dir() else f"{path}: no such cache file: check the path")
    try:
        return _read_whole(path, tokenizer_fingerprint, vocabulary_size)
    except _DAMAGED as error:
        other = _newest_good(path, tokenizer_fingerprint, vocabulary_size)
        remedy = "name a whole cache file" if other is None else f"the last good one is {other}"
        raise CacheError(f"{path}: not a readable Parquet file ({one_line(error)}): {remedy}") from error


def filling_of(path: str | Path) -> dict[str, Any] | None:
    """How far the filling of a cache file is; ``None`` if it is complete, damaged, or no cache."""
    with suppress(*_DAMAGED):
        return _filling_of(path)
    return None


def whole_filling_of(path: str | Path) -> dict[str, Any] | None:
    """How far the filling of a cache file is; ``None`` if it is complete. All of a filling is read once.

    Raises:
        CacheError: The file is damaged.
    """
    try:
        filling = _filling_of(path)
        if filling is not None:
            with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
                for _ in file.iter_batches(BATCH_ROWS):
                    pass
    except _DAMAGED as error:
        raise CacheError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    return filling


def _filling_of(path: str | Path) -> dict[str, Any] | None:
    filling = json.loads((pq.read_schema(path).metadata or {}).get(b"filling", b"null"))
    if not isinstance(filling, dict | None):
        raise ValueError("its filling is no JSON object")
    return filling


def _read_whole(path: Path, tokenizer_fingerprint: str, vocabulary_size: int | None) -> ExperienceCache:
    cache = ExperienceCache(tokenizer_fingerprint, vocabulary_size)
    _read_file(cache, path)
    _give_memory_back()
    return cache


def _newest_good(damaged: Path, tokenizer_fingerprint: str, vocabulary_size: int | None) -> Path | None:
    """The newest other cache in the folder of a damaged one, or of the same name in the folders beside it."""
    folder = damaged.absolute().parent
    others = {*folder.glob("*.parquet"), *folder.parent.glob(f"*/{damaged.name}")} - {damaged.absolute()}
    for path in sorted(others, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        with suppress(CacheError, *_DAMAGED):
            _read_whole(path, tokenizer_fingerprint, vocabulary_size)
            return path
    return None


def _batches(cache: ExperienceCache) -> Iterator[list[_Row]]:
    rows: list[_Row] = []
    tokens = 0
    for entry in cache:
        for slot, response in enumerate(entry.slots):
            if slot and response is None:
                continue
            rows.append((entry, slot, response))
            tokens += 0 if response is None else len(response)
            if tokens >= BATCH_TOKENS or len(rows) >= BATCH_ROWS:
                yield rows
                rows, tokens = [], 0
    if rows:
        yield rows


def _give_memory_back() -> None:
    """Return Arrow's unused memory to the system: it would hold as much as a small cache."""
    pa.default_memory_pool().release_unused()


def _as_batch(rows: list[_Row], schema: pa.Schema) -> pa.RecordBatch:
    entries, slots, responses = zip(*rows, strict=True)
    missing = pa.array([r is None for r in responses])
    there = [r for r in responses if r is not None]
    span_counts, spans = flat_spans([() if r is None else r.spans for r in responses])
    return pa.record_batch(
        [
            pa.array([e.uid for e in entries]),
            pa.array(slots, pa.int32()),
            pa.ListArray.from_arrays(
                _offsets([0 if r is None else len(r) for r in responses]),
                np.concatenate([r.token_ids for r in there]) if there else np.zeros(0, np.int32),
                mask=missing,
            ),
            pa.array([0.0 if r is None else r.reward for r in responses]),
            pa.array([r is not None and r.correct for r in responses]),
            pa.array([r is not None and r.finished for r in responses]),
            pa.ListArray.from_arrays(
                _offsets(span_counts), pa.StructArray.from_arrays(list(spans.T), names=["step", "count"])
            ),
            pa.array([e.visits for e in entries]),
            pa.array([e.restart for e in entries]),
            pa.array(
                [json.dumps(e.state) if slot == 0 and e.state else "" for e, slot in zip(entries, slots, strict=True)]
            ),
        ],
        schema=schema,
    )


def _offsets(lengths: list[int] | np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _read_file(cache: ExperienceCache, path: Path) -> None:
    # Pre-buffering would hold the whole file in memory.
    with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        metadata = schema.metadata or {}
        if b"tokenizer" not in metadata or b"version" not in metadata:
            raise CacheError(
                f"{path}: not an experience cache (no tokenizer fingerprint in its metadata): name a file that this "
                "package wrote"
            )
        version, fingerprint = (metadata[key].decode(errors="replace") for key in (b"version", b"tokenizer"))
        number = int(version) if version.isdecimal() else version
        require_same_origin(number, fingerprint, cache.tokenizer_fingerprint, str(path))
        if not schema.equals(_SCHEMAS[int(version)]):
            raise CacheError(
                f"{path}: its columns are not an experience cache's, which are {', '.join(SCHEMA.names)}: build a new "
                "cache"
            )
        require_room(file.metadata, str(path), CacheError)
        try:
            cache.shared = read_notes(metadata.get(b"shared", b"{}"))
        except ValueError as error:
            raise CacheError(
                f"{path}: its notes on all questions cannot be used ({error}): build a new cache"
            ) from error
        first = 1
        for batch in file.iter_batches(BATCH_ROWS):
            FileRows(batch, first, str(path)).put_into(cache)
            first += len(batch)
