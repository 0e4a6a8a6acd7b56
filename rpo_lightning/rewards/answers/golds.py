"""Texts that stand where a gold answer should, and are none."""

from __future__ import annotations

import re

_NO_ANSWERS = {
    "proof", "prove", "notfound", "not found", "n/a", "na", "nan", "none", "null", "unknown", "undefined answer",
    "no answer", "see solution", "open", "tbd", "todo", "-", "?", "missing", "error", "unanswerable", "not available",
    "not provided",
}  # fmt: skip
# Longer texts of several sentences are solutions, not answers.
_LONGEST_SENTENCES = 200


def is_solution(text: str) -> bool:
    """Whether a text is sentences rather than an answer."""
    stripped = text.strip()
    return len(stripped) > _LONGEST_SENTENCES and re.search(r"[a-z$]\.\s+[A-Z]|\n\s*\n", stripped) is not None


def no_gold(text: str) -> str | None:
    """Why a text cannot be a gold answer; ``None`` if it can."""
    stripped = text.strip()
    if not re.search(r"[\w∞∅]|\\[a-zA-Z]+", stripped) or stripped.casefold().strip(" .[]()") in _NO_ANSWERS:
        return "it is a word for no answer"
    if re.match(r"^\s*\{\s*['\"]\w+['\"]\s*:", text):
        return (
            "it is an object: name the column that holds the answer, as in data.answer_column=reward_model.ground_truth"
        )
    if is_solution(text):
        return (
            "it is a solution in which no answer is marked: mark it with \\boxed{} or ####, or name the answer's column"
        )
    return None
