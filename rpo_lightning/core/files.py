"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rpo_lightning.core.errors import ConfigurationError


def write_parquet(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), partial)


def write_json_lines(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as a JSON Lines file."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def require_place(path: str | Path, setting: str, is_folder: bool = False) -> None:
    """Check that something can be written to a path, before the work whose result it is.

    Args:
        path: A file, or a folder. It need not exist.
        setting: Names it in the message.
        is_folder: Whether it is a folder.

    Raises:
        ConfigurationError: It is of the other kind, or no folder above it can be written to.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != is_folder:
        kind, other = ("folder", "file") if is_folder else ("file", "folder")
        raise ConfigurationError(f"{setting}={path}: a {other} has this name: name a {kind}")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    missing = [part for part in path.absolute().parents if part.exists() and not part.is_dir()]
    if missing or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{setting}={path}: nothing can be written there: name another place")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to. When the block ends without an exception, that file replaces ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
