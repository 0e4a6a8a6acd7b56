"""Records of all ranks on rank zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpo_lightning.ranks import gather_objects


def gather_rows(rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all ranks; the first of those with equal keys, as metrics count them.

    Samplers repeat questions to give all ranks equally many. All ranks must call it.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for of_rank in gather_objects(rows):
        for row in of_rank:
            first.setdefault(tuple(row[k] for k in key), row)
    return list(first.values())
