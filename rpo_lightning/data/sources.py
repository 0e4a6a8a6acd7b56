"""Sources of rows: JSON Lines, Parquet, Hugging Face data sets, rows in memory."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_lightning.core.declared_size import require_room
from rpo_lightning.core.errors import DataError, one_line, require_modules

# Rows that are held as Python objects at a time.
_BATCH_ROWS = 512

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
        if Path(self.path).is_dir():
            raise DataError(f"{self.path}: a folder: name a file in it")
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
                except (RecursionError, ValueError) as error:
                    problem = (
                        "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
                    )
                    raise DataError(f"{self.path}, line {number}: {problem}: mend the line or leave it out") from error
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
            with pq.ParquetFile(path) as file:
                require_room(file.metadata, self.path, DataError)
                for batch in file.iter_batches(_BATCH_ROWS):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: not a readable Parquet file ({str(error).splitlines()[0]}): copy or write it again"
            ) from error


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
        """Yield the rows as they are stored: a path in one of them, as of an image, is not opened.

        Raises:
            ConfigurationError: ``datasets`` is not installed.
            DataError: It cannot load the data set.
        """
        require_modules("hub", "datasets", what=f"{self.name} is read as a Hugging Face data set")
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            dataset = load_dataset(self.name, self.subset, split=self.split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise DataError(
                f"data set {self!r} cannot be loaded ({one_line(error)}): check its name, or give a .jsonl or .parquet "
                "file"
            ) from error
        for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
            yield from table.to_pylist()

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
