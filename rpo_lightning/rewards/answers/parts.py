"""What a cleaned answer is made of: parts of a list, tuple or set; a value and its unit; a choice and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rpo_lightning.rewards.answers.cleaning import closes_at_end, unwrapped

_OPENING, _CLOSING = "([{", ")]}"
_CONJUNCTION = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:,\s*)?(?:and|or)(?![a-zA-Z])", re.IGNORECASE
)
_NAME = re.compile(
    r"^\s*(?:[a-zA-Z](?:_\{?\w+\}?)?'?|[a-zA-Z]\([a-zA-Z](?:,\s*[a-zA-Z])*\)|\([a-zA-Z](?:,\s*[a-zA-Z])+\)|[a-zA-Z]{3,}"
    r"|\\[a-zA-Z]+(?:_\{?\w+\}?)?)\s*(?:=|\\in(?![a-zA-Z]))\s*(?!=)"
)
# Units by their names; what is not here keeps its own word, without a plural's s.
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km",
    "kilometre": "km", "meter": "m", "metre": "m", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft",
    "yard": "yd", "mile": "mi", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "gram": "g",
    "kilogram": "kg", "pound": "lb", "liter": "l", "litre": "l", "milliliter": "ml", "dollar": "$", "usd": "$",
    "buck": "$", "cent": "cents", "percent": "%", "degree": "deg", "people": "person", "men": "man", "women": "woman",
    "children": "child",
}  # fmt: skip
_SHORT = {
    "cm", "mm", "km", "kg", "mg", "ml", "ft", "yd", "mi", "lb", "lbs", "oz", "hr", "hrs", "min", "mins", "sec",
    "secs", "mph", "kph", "hz", "khz", "kw", "kj", "mol", "pa", "kpa", "in", "am", "pm",
}  # fmt: skip
_SINGLE = set("mshgljnwvakJNWVAKCF")
_LONGEST_QUANTITY = 120
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNIT = {
    "unit",
    "units",
    "square",
    "cubic",
    "sq",
    "of",
    "in",
    "total",
    "each",
    "altogether",
    "old",
    "the",
    "a",
    "more",
}
_UNIT_AFTER_NUMBER = re.compile(
    r"^(?P<value>[-+]?\s*(?:\d+\s*/\s*\d+|(?:[^a-zA-Z\\]|\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z]))+))(?P<unit>.*)$",
    re.DOTALL,
)
_CURRENCY = re.compile(r"^\\?([$£€¥₹])\s*(.+)$|^([^£€¥₹]+?)\s*([£€¥₹])$", re.DOTALL)
_CHOICE = re.compile(
    r"^(?:(?i:option|choice|answer)\s)?\s*(?:\(\s*([A-Z])\s*\)|([A-Z]))\s*(?:[).:]\s*(.*)|(?<=\))\s*(.*)|)$", re.DOTALL
)


@dataclass(frozen=True)
class Several:
    """An answer of several parts.

    Attributes:
        parts: The parts.
        brackets: Around them, such as ``()`` or ``[)``; empty for a list or a set.
    """

    parts: tuple[str, ...]
    brackets: str = ""

    @property
    def is_ordered(self) -> bool:
        """Whether the order counts: it does in tuples and intervals."""
        return bool(self.brackets)


def several(text: str) -> Several | None:
    """The parts of a cleaned list, set, tuple or interval; ``None`` for a single answer."""
    text = re.sub(r"\\\{", "{", re.sub(r"\\\}", "}", text)) if text.startswith(r"\{") else text
    if text and text[0] in _OPENING and text[-1] in _CLOSING and closes_at_end(text, _OPENING, _CLOSING):
        inside = _split(text[1:-1], ",")
        if len(inside) > 1:
            return Several(tuple(inside)) if text[0] == "{" else Several(tuple(inside), text[0] + text[-1])
        return None
    plain = _CONJUNCTION.sub(",", text)
    plain = re.sub(r",\s*,", ",", plain)
    parts = [part for piece in _split(plain, ";") for part in _split(piece, ",")]
    return Several(tuple(parts)) if len(parts) > 1 else None


def without_name(text: str) -> str:
    r"""What follows ``x =``, ``f(x) =``, ``(x, y) =`` or ``x \in``; all of it if there is no such name."""
    found = _NAME.match(text)
    if found is None or "=" in text[found.end() :]:
        return text
    return text[found.end() :].strip()


def name_of(text: str) -> str | None:
    """The name on the left of an answer such as ``x = 5``."""
    found = _NAME.match(text)
    return None if found is None or without_name(text) == text else re.sub(r"[\s=]|\\in$", "", found[0])


def value_and_unit(text: str) -> tuple[str, str]:
    r"""A cleaned answer's value and its unit, which is empty if there is none: ``5 \text{ cm}`` is 5 and cm.

    Words that name no unit ("units", "in total") are left out too, and "million" becomes a factor.
    """
    text = text.strip()
    if len(text) > _LONGEST_QUANTITY:
        return text, ""
    money = _CURRENCY.match(text)
    if money:
        rest, unit = value_and_unit(money[2] or money[3])
        return rest, unit or money[1] or money[4]
    match = re.match(r"^(.*?)\s*(?:\(\s*\\?%\s*\)|\\%|%|\\text\s*\{\s*percent\s*\}|percent)$", text, re.DOTALL)
    if match and match[1]:
        return match[1].strip(), "%"
    match = re.match(
        r"^(.*?)\s*(?:\^\\circ|degrees?|\\text\s*\{\s*degrees?\s*\})(?:\s*(?:\\text\s*\{\s*[CF]\s*\}|[CF]))?$", text
    )
    if match and match[1]:
        return match[1].strip(), "deg"
    found = _UNIT_AFTER_NUMBER.match(text)
    if found is None or not found["unit"].strip():
        return text, ""
    value, rest = found["value"], found["unit"]
    rest = value[len(value.rstrip(" (")) :] + rest  # what opens the unit belongs to it
    value = value.rstrip(" (").strip()
    if not re.search(r"\d|\\", value):
        return text, ""
    read = _unit(rest)
    if read is None:
        return text, ""
    scale, unit = read
    return (rf"{value} \cdot {scale}" if scale != 1 else value), unit


def units_agree(first: str, second: str) -> bool:
    """Whether two units may belong to the same answer: one is missing, or one says what the other says."""
    if not first or not second or first == second:
        return True
    a, b = set(first.split()), set(second.split())
    return a <= b or b <= a


def choice(text: str) -> tuple[str, str] | None:
    """A capital letter of a multiple choice and the text behind it, such as ``(C) 12``; ``None`` for anything else."""
    found = _CHOICE.match(unwrapped(text).strip())
    if found is None:
        return None
    return found[1] or found[2], (found[3] or found[4] or "").strip()


def _unit(rest: str) -> tuple[int, str] | None:
    """Scale and unit behind a number; ``None`` if it is a factor rather than a unit."""
    is_text = re.match(r"\s*\\(?:text|mathrm|mbox|textbf|operatorname)", rest) is not None
    is_text |= re.fullmatch(r"\s*\([^()]*[a-zA-Z] [^()]*\)", rest) is not None  # several words in brackets
    is_apart = is_text or rest[:1] in " ("
    words = unwrapped(rest).strip().strip("()").strip()
    words = re.sub(r"\s*\\cdot\s*", "-", words)
    words = re.sub(r"\s+\^", "^", words)
    words = re.sub(r"\^\s*\{?\s*([23])\s*\}?", r"^\1", words)
    words = re.sub(r"\b(?:per)\b", "/", words)
    words = re.sub(r"\s*/\s*", "/", words)
    words = re.sub(r"\b(?:square|sq)\s+(\w+)", r"\1^2", words)
    words = re.sub(r"\bcubic\s+(\w+)", r"\1^3", words)
    if not words or re.search(r"[^a-zA-Z0-9^/' .\-]", words) or re.search(r"(?<![\^])\d", words):
        return None
    scale = 1
    tokens: list[str] = []
    for word in words.split():
        if word.lower() in _SCALES and not tokens:
            scale *= _SCALES[word.lower()]
            continue
        name = "/".join(_unit_name(part, is_text, is_apart) or "?" for part in word.split("/"))
        if "?" in name:
            return None
        if word.lower().rstrip("^23") not in _NO_UNIT:
            tokens.append(name)
    if any(word.lower() in ("and", "or", "to", "x", "mod", "over") for word in words.split()):
        return None
    return scale, " ".join(tokens)


def _unit_name(word: str, is_text: bool, is_apart: bool) -> str | None:
    base, caret, power = word.partition("^")
    lower = base.lower().strip(".'")
    if not lower:
        return None
    if len(base) == 1:
        return base + caret + power if base in _SINGLE and is_apart else None
    if lower not in _SHORT and not is_apart:
        return None
    if len(lower) == 2 and lower not in _SHORT and not is_text:
        return None
    singular = lower[:-1] if lower.endswith("s") and len(lower) > 2 and not lower.endswith("ss") else lower
    return _UNITS.get(lower, _UNITS.get(singular, singular)) + caret + power


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]
