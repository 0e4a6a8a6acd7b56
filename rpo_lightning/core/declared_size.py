"""The memory that a Parquet file declares to need, looked at before any of it is taken."""

from __future__ import annotations

import os
from typing import Any

from rpo_lightning.core.errors import RPOError

_GIB = 2**30
# Bytes of a value of each physical type; texts take at least their offset.
_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}


def require_room(metadata: Any, where: str, error: type[RPOError]) -> None:
    """Check that the values of a Parquet file fit into this machine's memory.

    Values that are all alike take hardly any room in a file: a small one may declare any number of them.

    Args:
        metadata: What ``pyarrow.parquet.ParquetFile.metadata`` returns.
        where: Names the file in the message.
        error: What to raise.

    Raises:
        RPOError: They do not fit.
    """
    declared = sum(_bytes_of(metadata.row_group(i)) for i in range(metadata.num_row_groups))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > memory:
        raise error(
            f"{where}: declares {metadata.num_rows} rows that take {declared / _GIB:.0f} GiB, and this machine has "
            f"{memory / _GIB:.0f} GiB: check where the file comes from, or split it"
        )


def _bytes_of(group: Any) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.num_values * _BYTES.get(column.physical_type, 4) for column in columns)
