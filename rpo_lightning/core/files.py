"""Files that are written whole or not at all.

Whatever ends a process, a reader finds the earlier file or the new one. The new one is on the disk before it takes the
name, so a machine that loses power leaves no empty file either.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rpo_lightning.core.errors import ConfigurationError, one_line

log = logging.getLogger(__name__)


class Unwritten:
    """What could not be written. Each kind of file is told once, until it could be written again.

    Attributes:
        causes: Why, by path.
    """

    def __init__(self) -> None:
        self.causes: dict[Path, str] = {}

    @contextmanager
    def goes_on(self, path: Path, kept: str) -> Iterator[None]:
        """Let the run go on if a file cannot be written in the block.

        Args:
            path: The file.
            kept: What becomes of its contents, for the message.
        """
        try:
            yield
        except OSError as error:
            cause = cause_of(error)
            if path not in self.causes:
                log.warning(f"{path}: could not be written ({cause}). The run goes on; {kept}")
            self.causes[path] = cause
        else:
            if self.causes.pop(path, None) is not None:
                log.info(f"{path}: could be written again")


def cause_of(error: OSError) -> str:
    """What the system says, such as "No space left on device", without the words that a library puts around it."""
    return os.strerror(error.errno) if error.errno else one_line(error)


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
    """Yield a path to write to. When the block ends without an exception, that file replaces ``path``.

    After an exception ``path`` is as it was, and what was written is removed: a full disk needs the room.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        put_on_disk(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    put_on_disk(path.parent)


def append(path: str | Path, text: str) -> None:
    """Append a text to a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that gets full takes a part of it first
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def put_on_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
