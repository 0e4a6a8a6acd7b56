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

_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
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
    blocks = [block for block in _ANSWER_BLOCK.findall(rest) if block.strip()]
    return str(blocks[-1]) if blocks else rest


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
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        position = start.end()
        if position < len(text) and text[position] == "{":
            end = _closing(text, position)
            if end is None:
                continue
            content, position = text[position + 1 : end], end + 1
        else:  # \boxed 7
            bare = re.match(r"[^\s$.,;{}]+", text[position:])
            if bare is None:
                continue
            content, position = bare[0], position + bare.end()
        inner = _boxes(content)
        if len(inner) == 1 and inner[0][:2] == (0, len(content.strip())):
            content = inner[0][2]
        if content.strip():
            found.append((start.start(), position, content.strip()))
    return found


def _closing(text: str, opening: int) -> int | None:
    """Where the brace that opens at a position closes; escaped braces do not count."""
    depth, index = 0, opening
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
        index += 1
    return None


def _are_joined(between: str) -> bool:
    return _JOINED.fullmatch(_BETWEEN.sub(lambda m: m[1] or " ", between).strip()) is not None
