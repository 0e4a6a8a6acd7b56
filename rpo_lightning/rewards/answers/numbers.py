"""Plain numbers, exactly: integers, decimals, fractions, mixed numbers, and numbers times a power of 10."""

from __future__ import annotations

import re
from fractions import Fraction

# Numbers with higher powers of 10 are not computed.
HIGHEST_POWER = 10_000
# A decimal stands for a number that it cannot equal, such as 1/3, from so many digits on.
_DIGITS = 6
_NUMBER = re.compile(
    r"^([-+]?)\s*(?:(\d+)\s*\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?|\\frac\s*\{?\s*([-+]?\d+)\s*\}?\s*\{?\s*([-+]?\d+)\s*\}?"
    r"|(\d+) (\d+)/(\d+)|([-+]?\d+)\s*/\s*([-+]?\d+)|(\d+\.?\d*|\.\d+))$"
)
_SCIENTIFIC = re.compile(
    r"^([-+]?(?:\d+\.?\d*|\.\d+))\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?$"
    r"|^([-+]?)10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?$"
)


def number(text: str) -> Fraction | None:
    """The exact value of a plain number: integer, decimal, fraction, mixed number, or a number times a power of 10."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    scaled = re.match(r"^(.*) \\cdot (10+)$", text)
    if scaled:
        value = number(scaled[1])
        return None if value is None else value * int(scaled[2])
    power = _SCIENTIFIC.match(text.replace(" ", "") if "\\" in text or "^" in text else text)
    if power:
        mantissa, exponent, sign, alone = power.groups()
        shift = int(exponent if exponent is not None else alone)
        if abs(shift) > HIGHEST_POWER:
            return None
        factor = Fraction(mantissa) if mantissa is not None else Fraction(-1 if sign == "-" else 1)
        return factor * Fraction(10) ** shift
    found = _NUMBER.match(re.sub(r"(?<=[-+]) ", "", text))
    if found is None or len(text) > 400:
        return None
    sign, whole, top, bottom, numerator, denominator, w2, t2, b2, t3, b3, decimal = found.groups()
    try:
        if whole is not None or w2 is not None:
            value = Fraction(int(whole or w2)) + Fraction(int(top or t2), int(bottom or b2))
        elif numerator is not None:
            value = Fraction(int(numerator), int(denominator))
        elif t3 is not None:
            value = Fraction(int(t3), int(b3))
        else:
            value = Fraction(decimal)
    except ZeroDivisionError:
        return None
    return -value if sign == "-" else value


def rounds_to(first: Fraction, second: Fraction, first_text: str, second_text: str) -> bool:
    """Whether one is a decimal that stands for the other, which no decimal equals."""
    for exact, decimal, text in ((first, second, second_text), (second, first, first_text)):
        digits = re.sub(r"^[-+ ]*0*\.?0*", "", text).replace(".", "")
        if re.fullmatch(r"[-+ ]*\d*\.\d+", text.strip()) and len(digits) >= _DIGITS and not _is_decimal(exact):
            places = len(text.partition(".")[2])
            return abs(exact - decimal) * 10**places <= Fraction(1, 1)
    return False


def _is_decimal(value: Fraction) -> bool:
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1
