r"""Which part of a text is the answer; the same rules for gold answers and responses.

1. Thoughts end at the last ``</think>``. A visible ``<think>`` that is never closed has no answer.
2. After them the last ``<answer>`` block that is not empty holds the answer.
3. In what is left, the last box counts (``\boxed{}``, ``\fbox{}``). Boxes that are joined by a comma, "and" or "or"
   in one sentence count together.
4. Without a box: what follows GSM8K's ``####``, else what follows the last "answer is" or "answer:".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^\s$.,;{}]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between boxes that are one answer, math mode and text commands aside.
_JOINED = re.compile(r"(?:,|;|and|or|,\s*and|,\s*or)", re.IGNORECASE)
_BETWEEN = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|,|;|:|!| )|\\[()\[\]]|[${}~]")
_ANCHOR = re.compile(r"(?:final\s+)?answer\s*(?:is|are|:|=)+\s*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|(?<=\))\.")


@dataclass(frozen=True)
class Extracted:
    """An answer as it stands in a text.

    Attributes:
        text: What is taken for the answer; all of the text if nothing marks one.
        is_marked: Whether a box, ``####`` or "answer is" marks it.
    """

    text: str
    is_marked: bool


def final_part(response: str) -> str | None:
    """The part of a response that should hold the answer; ``None`` if its thoughts never end."""
    _, closed, rest = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return None
    rest = rest if closed else response
    if "<think>" in rest:  # new thoughts after the last closed ones
        return None
    # Every piece but the last is closed. What opens its block is its first tag.
    blocks = [piece.partition("<answer>")[2] for piece in rest.split("</answer>")[:-1]]
    return next((block for block in reversed(blocks) if block.strip()), rest)


def extract(response: str) -> Extracted | None:
    """The answer of a response; ``None`` if there is none."""
    part = final_part(response)
    if part is None or not part.strip():
        return None
    marked = marked_answer(part)
    if marked is not None:
        return Extracted(marked, True)
    anchors = list(_ANCHOR.finditer(part))
    if anchors:
        told = part[anchors[-1].end() :].strip()
        end = _SENTENCE_END.search(told)
        told = told[: end.start()] if end else told
        if told.strip():
            return Extracted(told.strip(), True)
    return Extracted(part.strip(), False)


def marked_answer(text: str) -> str | None:
    """The content of the boxes that count, or what follows the last ``####``; ``None`` if neither is there."""
    boxes = _boxes(text)
    if boxes:
        counted = [boxes[-1]]
        for box in reversed(boxes[:-1]):
            if not _are_joined(text[box[1] : counted[0][0]]):
                break
            counted.insert(0, box)
        return ", ".join(content for _, _, content in counted)
    _, marker, final = text.rpartition("####")
    return final.strip() if marker else None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of all boxes with something in them; a box within a box is that box's content."""
    found: list[tuple[int, int, str]] = []
    closing = _closing_braces(text)
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        content = _content(text, start.end(), closing)
        if content is None:
            position = start.end()
            continue
        first, last, position = content
        while (inner := _filling_box(text, first, last, closing)) is not None:
            first, last = inner
        if text[first:last].strip():
            found.append((start.start(), position, text[first:last].strip()))
    return found


def _filling_box(text: str, start: int, end: int, closing: dict[int, int]) -> tuple[int, int] | None:
    """Start and end of what a box holds that is all there is between two positions; ``None`` if there is none."""
    inner = _BOX.match(text, start)
    content = inner and _content(text, inner.end(), closing)
    if not content or not text[content[0] : content[1]].strip():
        return None
    is_all = content[2] <= end and not text[content[2] : end].strip()
    return content[:2] if is_all else None


def _content(text: str, position: int, closing: dict[int, int]) -> tuple[int, int, int] | None:
    r"""Start and end of what a box holds whose command ends at a position, and the end of the box."""
    if text[position : position + 1] == "{":
        end = closing.get(position)
        return None if end is None else (position + 1, end, end + 1)
    bare = _BARE.match(text, position)  # \boxed 7
    return None if bare is None else (position, bare.end(), bare.end())


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed closes; escaped braces do not count."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _are_joined(between: str) -> bool:
    return _JOINED.fullmatch(_BETWEEN.sub(lambda m: m[1] or " ", between).strip()) is not None
