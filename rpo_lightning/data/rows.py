"""Rows as rewards and verifiers see them: plain JSON values, which travel to grading processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any
from uuid import UUID


def plain_row(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Make a row of JSON values.

    Numbers, arrays and tensors of other libraries become Python's, tuples lists, and NaN ``None``. Dates, times and
    UUIDs become text.

    Args:
        row: A row as its source gives it.

    Returns:
        The columns that are JSON then, and what each of the others holds: bytes, images, infinity.
    """
    plain: dict[str, Any] = {}
    others: dict[str, str] = {}
    for column, value in row.items():
        try:
            plain[str(column)] = _plain(value)
        except TypeError as error:
            others[str(column)] = str(error)
    return plain, others


def _plain(value: Any) -> Any:
    """A value as JSON; a ``TypeError`` says what it holds that is none."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        number = int(value) if isinstance(value, Decimal) and value == value.to_integral_value() else float(value)
        if math.isinf(number):
            raise TypeError("infinity")
        return None if math.isnan(number) else number
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"an object with keys of type {type(key).__name__}")
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy's and torch's
        return _plain(value.tolist())
    raise TypeError(type(value).__name__)
