"""Sources of rows: JSON Lines, Parquet, Hugging Face data sets, rows in memory."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_lightning.core.errors import DataError, require_modules

Row = Mapping[str, Any]


class DataSource(ABC):
    """Base class of sources. Its ``repr`` names the source in messages."""

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """Yield a mapping from columns to values for each question."""


class FileSource(DataSource):
    """Base class of sources that are a file.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def existing(self) -> Path:
        """The file.

        Raises:
            DataError: There is none.
        """
        if not Path(self.path).is_file():
            raise DataError(f"{self.path}: no such file: check the path")
        return Path(self.path)

    def __repr__(self) -> str:
        return self.path


class JsonLines(FileSource):
    """A JSON Lines file: a JSON object on each line, in UTF-8. Blank lines are ignored."""

    def rows(self) -> Iterator[Row]:
        """Yield the objects.

        Raises:
            DataError: The file is missing, or a line is not a JSON object.
        """
        with self.existing().open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig")  # a byte order mark may open the file
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self.path}, line {number}: not UTF-8 ({error.reason}): save the file in UTF-8"
                    ) from error
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
                    raise DataError(
                        f"{self.path}, line {number}: malformed JSON ({error.msg}): write one object a line"
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{self.path}, line {number}: expected a JSON object, found {type(row).__name__}: write one "
                        "object a line"
                    )
                yield row


class Parquet(FileSource):
    """A Parquet file."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: The file is missing, or is not a readable Parquet file.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.existing()
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        yield from table.to_pylist()


class HubDataset(DataSource):
    """A Hugging Face data set by name, or a folder that ``datasets.load_dataset`` reads.

    Args:
        name: Name or folder, e.g. ``openai/gsm8k``.
        subset: Configuration. Needed if the data set has several.
        split: Split to read.
    """

    def __init__(self, name: str, subset: str | None = None, split: str = "train") -> None:
        self.name = name
        self.subset = subset
        self.split = split

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            ConfigurationError: ``datasets`` is not installed.
            DataError: It cannot load the data set.
        """
        require_modules("hub", "datasets", what=f"{self.name} is read as a Hugging Face data set")
        from datasets import load_dataset

        try:
            dataset = load_dataset(self.name, self.subset, split=self.split)
        except (OSError, ValueError) as error:
            raise DataError(f"data set {self!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        yield from dataset

    def __repr__(self) -> str:
        return ":".join(part for part in (self.name, self.subset, self.split) if part)


class Rows(DataSource):
    """Rows in memory.

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
    """Make a source from a setting such as ``data.train``.

    Args:
        data: A source, rows, a path to ``.jsonl``, ``.json`` (one object a line) or ``.parquet``, or the name of a
            Hugging Face data set.
        split: Split to read if ``data`` is a name.

    Raises:
        DataError: ``data`` is a file of another kind.
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
