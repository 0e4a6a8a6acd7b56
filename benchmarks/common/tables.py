"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any


def cell(value: object) -> str:
    """A value in a table; a range where lowest and highest differ."""
    if isinstance(value, tuple):
        return " to ".join(dict.fromkeys(f"{v:.2f}" for v in value))
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(h.replace("_", " ") for h in rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(cell(v) for v in row.values()) + " |" for row in rows)])


def arm_rows(found: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str]) -> list[dict[str, object]]:
    """A row for each arm: means of its runs' figures, and the lowest and highest of several runs."""
    rows: list[dict[str, object]] = []
    for arm, runs in found.items():
        row: dict[str, object] = {"arm": arm, "seeds": len(runs)}
        for column in columns:
            values = [float(run[column]) for run in runs]
            form = ",.3f" if max(values) <= 1 else ",.1f"
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            row[column] = f"{mean(values):{form}}{spread}"
        rows.append(row)
    return rows
