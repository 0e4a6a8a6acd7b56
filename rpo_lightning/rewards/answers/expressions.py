"""Expressions, as math-verify reads and compares them, with guards against those that could take for ever."""

from __future__ import annotations

import itertools
import logging
import math
import re
from typing import Any

from rpo_lightning.rewards.answers.extraction import closing_brackets
from rpo_lightning.rewards.answers.numbers import HIGHEST_POWER, number
from rpo_lightning.rewards.answers.parts import value_and_unit

# Longer answers are compared as text only.
LONGEST = 600

# So much of the end of a text is searched for an answer that nothing marks.
_LONGEST_PROSE = 4000
_DECIMAL_POWER = re.compile(r"\^\s*\{\s*-?\d*\.\d+\s*\}")
_BARE_EXPONENT = re.compile(r"\d*(?:\s*\^[\s{]*\d+)*")
# Names of numbers, which count as 3.
_CONSTANT = re.compile(r"\\pi(?![a-zA-Z])|(?<![\\a-zA-Z])e(?![a-zA-Z])")
# Brackets that are nested deeper are no answer. Reading them takes time that grows exponentially.
_DEEPEST = 24
_HIGHEST_SIZE = math.log10(HIGHEST_POWER)

# The pool enforces the time limit, so math-verify's own is off. It warns of that in every process.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: not record.getMessage().startswith("Timeout is disabled"))


def as_float(text: str) -> float | None:
    """The value of an expression, ``None`` if it has none."""
    value = number(value_and_unit(text)[0])
    if value is not None:
        return float(value)
    parsed = parse(text)
    if not parsed or isinstance(parsed[0], str):
        return None
    expression = parsed[0].rhs if type(parsed[0]).__name__ == "Equality" else parsed[0]
    if not (getattr(expression, "is_number", False) and getattr(expression, "is_real", False)):
        return None
    result = float(expression)
    return result if math.isfinite(result) else None


def parse(text: str) -> list[Any]:
    """What math-verify makes of an answer; empty if it cannot read it or if that could take for ever."""
    if len(text) > LONGEST or _is_deep(text) or _is_a_tower(text):
        return []
    from math_verify import parse as math_parse

    # In braces, letters behind a number are factors; bare ones math-verify takes for units.
    text = re.sub(r"(?<=[\d})])\s*([a-zA-Z]{1,2})(?![a-zA-Z_(])", lambda m: "".join(f"{{{x}}}" for x in m[1]), text)
    text = re.sub(r"(\\(?:cdot|times)\s+)([a-zA-Z])(?![a-zA-Z_(])", r"\1{\2}", text)
    text = _DECIMAL_POWER.sub(lambda m: _with_fractions(m[0]), text)
    if "matrix" in text:  # elements are compared exactly
        text = _with_fractions(text)
        text = re.sub(r"(?<![\w}])(\d+)/(\d+)(?![\w{])", r"\\frac{\1}{\2}", text)
    # The pool enforces the limit; math-verify's own alarms would only add signal handlers.
    return list(math_parse(rf"\boxed{{{text}}}", parsing_timeout=None))


def math_equal(gold: str, given: str) -> bool:
    """Whether math-verify finds two expressions equal; small numbers are compared relatively."""
    from math_verify import verify

    first, second = parse(gold), parse(given)
    if not first or not second:
        return False
    values = [_small(x[0]) for x in (first, second)]
    if None not in values and values[0] != values[1]:
        scale = max(abs(v) for v in values if v is not None)
        if scale < 1e-3:  # math-verify's tolerance is absolute
            return bool(abs(values[0] - values[1]) <= 1e-6 * scale)  # type: ignore[operator]
    return bool(verify(first, second, timeout_seconds=None))


def _with_fractions(text: str) -> str:
    """A text with fractions for its decimals, which math-verify takes for floats."""
    return re.sub(r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)


def _small(expression: Any) -> float | None:
    if not (getattr(expression, "is_number", False) and getattr(expression, "is_real", False)):
        return None
    value = float(expression)
    return value if math.isfinite(value) else None


def _is_deep(text: str) -> bool:
    """Whether brackets are so nested that reading them could take for ever."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    return max(depths, default=0) > _DEEPEST


def _is_a_tower(text: str) -> bool:
    """Whether powers and factorials are so high or so nested that computing them would not end."""
    if text.count("^") > 12 or text.count("!") > 3 or re.search(r"!\s*!", text):
        return True
    text = _CONSTANT.sub("3", text)
    parts = [_size(part) for part in _exponents(text) + _under_factorials(text)]
    return max(parts + _powers_of_powers(text), default=0.0) > _HIGHEST_SIZE


def _powers_of_powers(text: str) -> list[float]:
    """For each ``^`` behind a group with powers in it, the decimal logarithm of how many digits that can have."""
    opening = {end: start for pair in ("{}", "()", "[]") for start, end in closing_brackets(text, pair).items()}
    found = []
    for sign in re.finditer(r"[)}\]]\s*\^", text):
        group = text[opening.get(sign.start(), 0) : sign.start()]
        exponent = _exponents(text[sign.end() - 1 :])[0]
        if "^" in group:
            found.append(math.log10(max(_size(group), 1.0)) + _size(exponent))
    return found


def _exponents(text: str) -> list[str]:
    """What stands behind each ``^``: a group with all that is in it, or a numeral with its own powers."""
    closing = closing_brackets(text) | closing_brackets(text, "()")
    found = []
    for sign in re.finditer(r"\^\s*", text):
        if sign.end() in closing:
            found.append(text[sign.end() : closing[sign.end()]])
        else:
            found.append(_BARE_EXPONENT.match(text, sign.end())[0])  # type: ignore[index]  # may match nothing
    return found


def _under_factorials(text: str) -> list[str]:
    """What stands before each ``!``: a numeral, the group that ends there, or all of it if that begins nowhere."""
    opening = {end: start for pair in ("{}", "()", "[]") for start, end in closing_brackets(text, pair).items()}
    found = []
    for sign in re.finditer(r"(\d*)((?:\\right)?\s*[)}\]])?\s*!", text):
        start = opening.get(sign.end(2) - 1, 0) if sign[2] else sign.start()
        found.append(text[start : sign.end() - 1])
    return found


def _size(text: str) -> float:
    """The decimal logarithm of the highest number that numerals with products and powers between them can be."""
    if "!" in text:
        return math.inf
    if "^" not in text and re.search(r"[+-]", text):
        return max(_size(term) for term in re.split(r"[+-]", text))
    size = 0.0
    for sign, numeral in re.findall(r"(\^[\s{]*)?(\d+)", text):
        value = float(numeral[:300])
        size = size * value if sign else size + math.log10(max(value, 1.0))
    return size


def found_by_math_verify(text: str) -> str | None:
    """The text of the answer that math-verify finds in prose; ``None`` if it finds none."""
    from math_verify import parse as math_parse

    found = math_parse(text[-_LONGEST_PROSE:], parsing_timeout=None)
    return str(found[-1]) if found else None
