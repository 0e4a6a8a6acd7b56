"""Tables in Markdown."""

from __future__ import annotations


def cell(value: object) -> str:
    """A value in a table; a range where lowest and highest differ."""
    if isinstance(value, tuple):
        return " to ".join(dict.fromkeys(f"{v:.2f}" for v in value))
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(h.replace("_", " ") for h in rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(cell(v) for v in row.values()) + " |" for row in rows)])
