"""Columns of a row of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether a row has a column, and its value; ``a.b`` is the key ``b`` of the object in column ``a``."""
    if column in row:
        return True, row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value
