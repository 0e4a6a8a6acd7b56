r"""One spelling for the many ways of writing the same: characters, spaces, LaTeX's variants, Python's operators.

Nothing here knows which answer is gold. Two texts that are equal after ``clean`` are the same answer.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTIONS = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅛": (1, 8), "⅜": (3, 8),
              "⅝": (5, 8), "⅞": (7, 8), "⅙": (1, 6), "⅚": (5, 6)}  # fmt: skip
_SYMBOLS = {
    "−": "-", "–": "-", "‒": "-", "—": "-", "﹣": "-", "×": r" \times ", "·": r" \cdot ", "⋅": r" \cdot ", "÷": "/",
    "π": r" \pi ", "∞": r" \infty ", "°": r"^\circ ", "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "≈": r" \approx ",
    "±": r" \pm ", "∪": r" \cup ", "∩": r" \cap ", "∅": r"\emptyset", "∈": r" \in ", "θ": r" \theta ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2061": "", "\u200b": "", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
_RENAMED = [
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits|nolimits)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:varnothing|phi(?=\s*$))(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\(?:degree|deg)(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ"),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"<=|=<"), r" \\le "),
    (re.compile(r">=|=>"), r" \\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(begin|end)\{[bvBV]matrix\}"), r"\\\1{pmatrix}"),
]
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|,\\!|~)+(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]|\.\d*,)")
_EXPONENT = re.compile(r"(?<![\w\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)")
_SPACED_DIGITS = re.compile(r"\\(?:mathbf|boldsymbol|bm|textbf)\s*\{\s*(\d(?: \d)+)\s*\}")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\(|\{)")
_CALL = re.compile(r"(?<![\\a-zA-Z])(sqrt|exp|ln|log|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan)(?=\s*[({\s\d]|$)")
_MARKUP = re.compile(r"\*\*(.+?)\*\*|`(.+?)`|__(.+?)__")
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname|bm|emph)\s*(?=\{)"
)
# Text commands that lie deeper in one another are left as they are: each layer costs a pass over the text.
_DEEPEST_WRAPPERS = 20
_ENDS = " \t\n.,;:!?\"'"


def clean(text: str) -> str:
    """A text in the one spelling, math mode and punctuation at the ends left out."""
    text = _characters(text.strip())
    text = _without_math_mode(text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _SPACED_DIGITS.sub(lambda m: m[1].replace(" ", ""), text)
    text = _THIN_SPACE_IN_NUMBER.sub("", text)
    text = re.sub(r"(?<!\\)\\[,;:! ]|~", " ", text)
    text = _EXPONENT.sub(lambda m: rf"{m[1]} \times 10^{{{int(m[2])}}}", text)
    text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    text = _operators(text)
    text = re.sub(r"\s+", " ", text)
    return _trimmed(text)


def same_text(first: str, second: str) -> bool:
    """Whether cleaned texts are the same but for spaces and text commands; words also but for capitals."""
    a, b = _bare(first), _bare(second)
    if a == b:
        return True
    return len(a) > 1 and len(b) > 1 and "\\" not in a + b and a.casefold() == b.casefold()


def unwrapped(text: str) -> str:
    r"""A text without its text commands: ``\text{ten} 5`` becomes ``ten 5``."""
    for _ in range(_DEEPEST_WRAPPERS):
        text, found = re.subn(_WRAPPERS.pattern + r"\{([^{}]*)\}", r" \1 ", text)
        if not found:
            break
    return re.sub(r"\s+", " ", text).strip()


def closes_at_end(text: str, opening: str = "{", closing: str = "}") -> bool:
    """Whether the bracket that a text begins with closes at its end.

    Args:
        text: The text.
        opening: Brackets that open.
        closing: Brackets that close.
    """
    depth = 0
    for index, character in enumerate(text):
        depth += (character in opening) - (character in closing)
        if depth == 0:
            return index == len(text) - 1
    return False


def _bare(text: str) -> str:
    return re.sub(r"[\s{}]", "", unwrapped(text))


def _characters(text: str) -> str:
    for character, (top, bottom) in _FRACTIONS.items():
        text = text.replace(character, rf"\frac{{{top}}}{{{bottom}}}")
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    for character, replacement in _SYMBOLS.items():
        text = text.replace(character, replacement)
    text = _ROOT.sub(lambda m: r"\sqrt" + (m[1] if m[1] in "({" else f"{{{m[1]}}}"), text)
    return unicodedata.normalize("NFKC", text)


def _without_math_mode(text: str) -> str:
    text = _MARKUP.sub(lambda m: m[1] or m[2] or m[3], text)
    text = re.sub(r"\\[()\[\]]", "", text)
    dollars = re.findall(r"(?<!\\)\$", text)
    # A dollar that opens no math mode is money.
    return re.sub(r"(?<!\\)\$", r"\\$" if len(dollars) == 1 and re.search(r"\$\s*\d", text) else "", text)


def _operators(text: str) -> str:
    """Python's spelling as LaTeX's."""
    text = re.sub(r"\*\*\s*(\([^()]*\)|-?[\w.]+)", lambda m: "^{" + m[1].strip("()") + "}", text)
    text = re.sub(r"(?<!\\)\*", r" \\cdot ", text)
    text = _CALL.sub(r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\[[^\]]*\])?\s*(\d)(?!\d)", r"\\sqrt\1{\2}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:pi|Pi|PI)(?![a-zA-Z])", r"\\pi ", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty ", text, flags=re.IGNORECASE)
    return re.sub(r"\\mathrm\s*\{\s*([ie])\s*\}", r"\1", text)


def _trimmed(text: str) -> str:
    previous = None
    while previous != text:
        previous = text
        text = text.rstrip(_ENDS.replace("!", "")).lstrip(_ENDS.replace(".", ""))  # 10! is a factorial, .5 a number
        text = re.sub(r"\\+$", "", text).strip()
        if text.startswith("=") and not text.startswith("=="):
            text = text[1:].strip()
        wrapper = _WRAPPERS.match(text)
        if wrapper and closes_at_end(text[wrapper.end() :]):
            text = text[wrapper.end() :]
        if text.startswith("{") and closes_at_end(text):
            text = text[1:-1].strip()
    return text
