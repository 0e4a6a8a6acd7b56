"""Where rows come from: JSON Lines, Parquet, Hugging Face data sets, or rows in memory."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_lightning.core.errors import DataError

Row = Mapping[str, Any]


class DataSource(ABC):
    """Anything that yields rows; its ``repr`` names it in messages."""

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """Yield one mapping a question."""


class JsonLines(DataSource):
    """A JSON Lines file: one object a line, blank lines ignored.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        """Yield the objects.

        Raises:
            DataError: The file is missing, or a line is no JSON object.
        """
        with _existing(self.path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig")  # a byte order mark may open the file
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path}, line {number}: not UTF-8 ({error.reason})") from error
                if not line.strip():
                    continue
                if line.lstrip().startswith("["):
                    raise DataError(
                        f"{self.path}, line {number}: expected a JSON object, found the beginning of an array: write "
                        "one object a line, as jq -c '.[]' does"
                    )
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{self.path}, line {number}: malformed JSON ({error.msg})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{self.path}, line {number}: expected a JSON object, found {type(row).__name__}")
                yield row

    def __repr__(self) -> str:
        return self.path


class Parquet(DataSource):
    """A Parquet file.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: The file is missing or not readable.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = _existing(self.path)
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        yield from table.to_pylist()

    def __repr__(self) -> str:
        return self.path


class HubDataset(DataSource):
    """A data set by its Hugging Face name, or any folder that ``datasets.load_dataset`` reads.

    Args:
        name: E.g. ``openai/gsm8k``.
        subset: Configuration, where the data set has several.
        split: Split to read.
    """

    def __init__(self, name: str, subset: str | None = None, split: str = "train") -> None:
        self.name = name
        self.subset = subset
        self.split = split

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: ``datasets`` is not installed, or finds no such data set.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(f"{self.name}: reading a Hugging Face data set needs 'pip install datasets'") from error
        try:
            dataset = load_dataset(self.name, self.subset, split=self.split)
        except (OSError, ValueError) as error:
            raise DataError(f"data set {self!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        yield from dataset

    def __repr__(self) -> str:
        return ":".join(part for part in (self.name, self.subset, self.split) if part)


class Rows(DataSource):
    """Rows that are already in memory.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def rows(self) -> Iterator[Row]:
        """Yield the rows."""
        yield from self._rows

    def __repr__(self) -> str:
        return f"{len(self._rows)} rows in memory"


def as_source(data: str | Path | DataSource | Sequence[Row], split: str) -> DataSource:
    """Turn what users write into a source.

    Args:
        data: A source, rows, a path to ``.jsonl``, ``.json`` (one object a line) or ``.parquet``, or a data set's name.
        split: Split to read where a bare data set name is given.

    Raises:
        DataError: A file of another kind.
    """
    if isinstance(data, DataSource):
        return data
    if isinstance(data, Path):
        data = str(data)
    if not isinstance(data, str):
        return Rows(list(data))
    if data.endswith((".jsonl", ".json")):
        return JsonLines(data)
    if data.endswith(".parquet"):
        return Parquet(data)
    if Path(data).is_file():
        raise DataError(f"{data}: questions are read from .jsonl, .json and .parquet files")
    return HubDataset(data, split=split)


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    return Path(path)
