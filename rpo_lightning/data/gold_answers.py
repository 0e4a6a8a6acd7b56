"""Gold answers in the shapes that data sets are published in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rpo_lightning.core.types import GoldAnswer
from rpo_lightning.rewards.answers.extraction import extract, marked_answer
from rpo_lightning.rewards.answers.golds import is_solution

# Only of rows with a "final_answer": elsewhere the name means other things.
TOLERANCE_COLUMN = "error"


def gold_answer(value: Any, tolerance: Any = None) -> GoldAnswer:
    r"""A gold answer in the shapes that data sets are published in.

    Args:
        value: A number; a list of parts; or text, which is read as a response is
            (``rpo_lightning.rewards.answers.extraction``): its last box, what follows ``####``, or all of it.
        tolerance: How far numbers may be from it: a number, or text such as ``1e-2`` or ``0.1,0.2`` (one a part).

    Raises:
        ValueError: The tolerance is no number, negative or infinite.
    """
    parts = [_answer_text(part) for part in (value if isinstance(value, list | tuple) else [value])]
    if is_empty(tolerance):
        return GoldAnswer(*parts)
    try:
        tolerances = tuple(float(t) for t in str(tolerance).split(","))
    except ValueError:
        tolerances = (math.nan,)
    if not all(0 <= t < math.inf for t in tolerances):
        raise ValueError(f"its {TOLERANCE_COLUMN} {str(tolerance)[:40]!r} is no tolerance")
    return GoldAnswer(*parts, tolerances=tolerances)


def _answer_text(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, value))
        raise ValueError(
            f"its gold answer is an object with the keys {keys}: name one of them, as in "
            "data.answer_column=reward_model.ground_truth"
        )
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"its gold answer is {value}")
    if not isinstance(value, str | int | float | Decimal):  # truth values are numbers
        raise ValueError(f"its gold answer is of type {type(value).__name__}: give a text or a number")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    text = str(value)
    marked = marked_answer(text)
    if marked is not None:
        return marked.replace(",", "") if "####" in text and "\\boxed" not in text else marked
    if is_solution(text):  # its last sentence may say what the answer is
        told = extract(text)
        return told.text if told is not None and told.is_marked else text.strip()
    return text.strip()


def is_empty(value: Any) -> bool:
    """Whether a cell, or a part of a list, holds nothing: ``None``, NaN, blanks or an empty list."""
    if isinstance(value, list | tuple):
        return not value or any(is_empty(part) for part in value)
    return value is None or str(value).strip() == "" or (isinstance(value, float) and math.isnan(value))
