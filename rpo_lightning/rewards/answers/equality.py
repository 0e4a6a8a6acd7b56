r"""Whether two answers are equal, whatever they are: numbers, expressions, lists, units, words, choices.

The order is from cheap and sure to dear: equal texts; words as words; parts one by one; units; plain numbers, exactly;
what is left goes to math-verify, one expression at a time.
"""

from __future__ import annotations

import math
import re

from rpo_lightning.rewards.answers.cleaning import clean, same_text, unwrapped
from rpo_lightning.rewards.answers.expressions import LONGEST, as_float, math_equal
from rpo_lightning.rewards.answers.numbers import number, rounds_to
from rpo_lightning.rewards.answers.parts import (
    Several,
    choice,
    name_of,
    several,
    units_agree,
    value_and_unit,
    without_name,
)

_MOST_PARTS = 12
_FUNCTIONS = frozenset(
    {
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln",
        "lg", "exp", "sqrt", "max", "min", "gcd", "lcm", "mod", "det", "lim", "inf", "sup", "frac", "dfrac", "cdot",
        "times", "pi",
    }
)  # fmt: skip
_SHORT_WORDS = frozenset(
    {
        "no", "on", "or", "of", "in", "is", "it", "up", "us", "we", "at", "an", "as", "be", "by", "do", "go", "he",
        "if", "me", "my", "so", "to", "am", "pm",
    }
)  # fmt: skip
_BASE = re.compile(r"^\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(\w+?)\s*\}?\s*\}?$")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "twelve": "12", "sixteen": "16",
}  # fmt: skip


def equal(gold: str, given: str) -> bool:
    """Whether an answer equals the gold one; both as they were extracted."""
    if len(gold) > LONGEST or len(given) > LONGEST:
        return same_text(gold.strip(), given.strip())
    return _equal(clean(gold), clean(given))


def is_only_text(gold: str) -> bool:
    """Whether nothing but its own text equals a gold answer."""
    text = clean(gold)
    return is_words(without_name(text)) and choice(text) is None


def is_words(text: str) -> bool:
    r"""Whether a cleaned answer is words rather than an expression: ``east``, ``June 20``, ``\text{both}``."""
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", unwrapped(text))
    words = re.findall(r"[^\W\d_]+", bare)
    long = [w for w in words if (len(w) > 2 or w.lower() in _SHORT_WORDS) and w.lower() not in _FUNCTIONS]
    return bool(long)


def _equal(gold: str, given: str) -> bool:
    if not gold or not given:
        return False
    if same_text(gold, given):
        return True
    letter = choice(gold)
    if letter is not None:
        return _same_choice(letter, given)
    for form in (_sides_of_approx, _sides_of_plus_minus, _bases):
        told = form(gold, given)
        if told is not None:
            return told
    gold, given = _last_side(gold), _last_side(given)
    gold_parts, given_parts = several(without_name(gold)), several(without_name(given))
    if gold_parts or given_parts:
        return _same_parts(gold, given, gold_parts, given_parts)
    gold_name, given_name = name_of(gold), name_of(given)
    if (
        gold_name
        and given_name
        and gold_name.casefold() != given_name.casefold()
        and len(gold_name) == len(given_name) == 1
    ):
        return False
    if _ends_otherwise(gold, given):
        return False
    return _same_quantity(without_name(gold), without_name(given)) or (
        "=" in gold + given and not is_words(gold) and math_equal(gold, given)
    )


def _ends_otherwise(gold: str, given: str) -> bool:
    """Whether a chain of equalities ends with something else than a gold answer that is none. Reads that end only."""
    if "=" in gold or "=" not in given:
        return False
    last = re.sub(r"\s*\\end\{\w+\}$", "", given.rpartition("=")[2]).strip()
    is_whole = bool(last) and last.count("{") == last.count("}")
    return is_whole and not _same_quantity(gold, last)


def _last_side(text: str) -> str:
    """The end of a chain of equalities that starts with a name or consists of equal numbers; else all of the text."""
    if several(text) is not None:
        return text
    sides = [side.strip() for side in re.split(r"(?<![<>!=\\])=(?!=)", text)]
    if len(sides) < 2 or not all(sides):
        return text
    if name_of(f"{sides[0]} = 1") is not None:
        return f"{sides[0]} = {sides[-1]}"
    if is_words(text) or (last := as_float(sides[-1])) is None:
        return text
    are_equal = all((value := as_float(side)) is not None and math.isclose(value, last, rel_tol=1e-9) for side in sides)
    return sides[-1] if are_equal else text


def _same_choice(gold: tuple[str, str], given: str) -> bool:
    found = choice(given)
    if found is not None:
        same_letter = found[0] == gold[0]
        return same_letter and (not gold[1] or not found[1] or _equal(clean(gold[1]), clean(found[1])))
    return bool(gold[1]) and _equal(clean(gold[1]), given)


def _same_quantity(gold: str, given: str) -> bool:
    """Compare two single answers, of which each may have a unit."""
    if same_text(gold, given):
        return True
    (gold_value, gold_unit), (value, unit) = value_and_unit(gold), value_and_unit(given)
    if not units_agree(gold_unit, unit):
        return False
    if (gold_value, value) != (gold, given):
        if _same_value(gold_value, value):
            return True
        if "%" in (gold_unit, unit) and gold_unit != unit:
            share, other = (gold_value, value) if gold_unit == "%" else (value, gold_value)
            return _same_value(rf"\frac{{{share}}}{{100}}", other)
        return False
    if is_words(gold) or is_words(given):
        return False
    return _same_value(gold, given)


def _same_value(gold: str, given: str) -> bool:
    first, second = number(gold), number(given)
    if first is not None and second is not None:
        return first == second or rounds_to(first, second, gold, given)
    if same_text(gold, given):
        return True
    if is_words(gold) or is_words(given):
        return False
    if bool(_variables(gold)) != bool(_variables(given)):
        return False  # math-verify takes letters behind a number for units
    return math_equal(gold, given)


def _variables(text: str) -> set[str]:
    """Letters of an expression that are neither commands nor constants."""
    bare = re.sub(r"\\[a-zA-Z]+", " ", unwrapped(text))
    return set(re.findall(r"[a-zA-Z]", bare)) - {"e", "i"}


def _same_parts(gold: str, given: str, golds: Several | None, found: Several | None) -> bool:
    if golds is None or found is None:
        # An interval may also be written as an inequality.
        one = golds or found
        single = given if golds else gold
        if one is not None and not one.brackets and all(_equal(clean(one.parts[0]), clean(p)) for p in one.parts[1:]):
            return _equal(clean(one.parts[0]), single)  # one answer in several forms
        is_interval = one is not None and len(one.parts) == 2 and one.is_ordered
        return is_interval and bool(re.search(r"[<>]|\\le|\\ge", single)) and math_equal(gold, given)
    if golds.brackets != found.brackets or len(golds.parts) != len(found.parts):
        return False
    if golds.is_ordered:
        return all(_equal(clean(a), clean(b)) for a, b in zip(golds.parts, found.parts, strict=True))
    if len(golds.parts) > _MOST_PARTS:
        return sorted(golds.parts) == sorted(found.parts)
    left = list(found.parts)
    for part in golds.parts:
        match = next((i for i, other in enumerate(left) if _equal(clean(part), clean(other))), None)
        if match is None:
            return False
        del left[match]
    return True


def _sides_of_approx(gold: str, given: str) -> bool | None:
    r"""Compare answers of the form ``a \approx b``, of which either side counts."""
    sides = [[side.strip() for side in text.split(r"\approx")] for text in (gold, given)]
    if all(len(s) == 1 for s in sides):
        return None
    if any(len(s) > 2 or not all(s) or not _is_near(*s) for s in sides if len(s) > 1):
        return False
    return any(_equal(clean(a), clean(b)) for a in sides[0] for b in sides[1])


def _is_near(first: str, second: str) -> bool:
    """Whether two sides of an approximation can be one number: a name fits everything."""
    a, b = as_float(first), as_float(second)
    return a is None or b is None or abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _sides_of_plus_minus(gold: str, given: str) -> bool | None:
    r"""Compare answers of which one has a single ``\pm``, which stands for two."""
    counts = [text.count(r"\pm") for text in (gold, given)]
    if max(counts) != 1 or several(without_name(gold if counts[0] else given)) is not None:
        return None
    both = []
    for text, count in ((gold, counts[0]), (given, counts[1])):
        text = without_name(text)
        both.append(f"{text.replace(chr(92) + 'pm', '+')}, {text.replace(chr(92) + 'pm', '-')}" if count else text)
    parts = [several(text) for text in both]
    return None if None in parts else _same_parts(both[0], both[1], parts[0], parts[1])


def _bases(gold: str, given: str) -> bool | None:
    """Compare numbers with a base, such as ``1010_2``; a base may be left out."""
    first, second = _BASE.match(gold), _BASE.match(given)
    if first is None and second is None:
        return None
    digits = [m[1] if m else re.sub(r"[\s()]", "", text) for m, text in ((first, gold), (second, given))]
    bases = [_BASES.get(m[2].lower(), m[2]) if m else None for m in (first, second)]
    if not all(base is None or base.isdigit() for base in bases):
        return None
    return digits[0].lower() == digits[1].lower() and (None in bases or bases[0] == bases[1])
