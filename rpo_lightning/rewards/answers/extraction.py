r"""Which part of a text is the answer; the same rules for gold answers and responses.

1. Thoughts end at the last ``</think>``. A visible ``<think>`` that is never closed has no answer.
2. After them the last ``<answer>`` block that is not empty holds the answer.
3. In what is left, the last box counts (``\boxed{}``, ``\fbox{}``, ``\framebox{}``). Boxes that are joined by a comma,
   "and" or "or" in one sentence count together. A box that is cut off does not count.
4. Without a box: what follows GSM8K's ``####``, else what follows the last "answer is", "answer:" or "correct option
   is".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BARE = re.compile(r"[^\s$.,;{}]+")
_BRACKET = {pair: re.compile(rf"\\.|[{re.escape(pair)}]", re.DOTALL) for pair in ("{}", "()", "[]")}
# What may stand between boxes that are one answer, math mode and text commands aside.
_JOINED = re.compile(r"(?:,|;|and|or|,\s*and|,\s*or)(?:\s*[a-z](?:_\w)?\s*=)?", re.IGNORECASE)
_BETWEEN = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|,|;|:|!| )|\\[()\[\]]|[${}~]")
_ANCHOR = re.compile(
    r"(?:answer|(?:correct|right)\s+(?:option|choice))\s*(?:\*\*)?\s*(?:is|are|:|=)+\s*:?"
    r"(?:\s*(?:therefore|thus|hence|then|simply|just)\b[,:]?)?",
    re.IGNORECASE,
)
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
    part = _before_cut_off_box(part)
    told = _told_answer(part)
    if told:
        return Extracted(told, True)
    return Extracted(part.strip(), False) if part.strip() else None


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


def _told_answer(text: str) -> str:
    """What follows the last "answer is" in its sentence; empty if nothing does."""
    anchors = list(_ANCHOR.finditer(text))
    if not anchors:
        return ""
    told = text[anchors[-1].end() :].strip()
    end = _SENTENCE_END.search(told)
    told = told[: end.start()].strip() if end else told
    # Bold print that began or ends outside of the answer, as in **Answer:** 9.
    return told.removeprefix("**").removesuffix("**").strip() if told.count("**") % 2 else told


def _before_cut_off_box(text: str) -> str:
    """What stands before the first box that is never closed; all of a text without one."""
    closing = closing_brackets(text)
    cut_off = (m.start() for m in _BOX.finditer(text) if text[m.end() : m.end() + 1] == "{" and m.end() not in closing)
    return text[: next(cut_off, len(text))]


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of all boxes with something in them; a box within a box is that box's content."""
    found: list[tuple[int, int, str]] = []
    closing = closing_brackets(text)
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


def closing_brackets(text: str, pair: str = "{}") -> dict[int, int]:
    """Where each bracket that is closed closes; escaped ones do not count."""
    closing, opened = {}, []
    for bracket in _BRACKET[pair].finditer(text):
        if bracket[0] == pair[0]:
            opened.append(bracket.start())
        elif bracket[0] == pair[1] and opened:
            closing[opened.pop()] = bracket.start()
    return closing


def _are_joined(between: str) -> bool:
    return _JOINED.fullmatch(_BETWEEN.sub(lambda m: m[1] or " ", between).strip()) is not None
