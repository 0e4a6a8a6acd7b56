"""Answers that are built to break a grader, mixed with answers whose verdict is known; drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LONG = 100_000
ENDLESS = "endless comparisons"

_FRAGMENTS = [
    r"\frac", "{", "}", "(", ")", "[", "]", "^", "_", "\\", r"\sqrt", r"\boxed", r"\boxed{", "$", "1", "2", "9", "0",
    ".", ",", "-", "+", "=", "!", "%", r"\pi", "x", "y", "sin", r"\log", r"\int", r"\sum", r"\text{", " and ", " or ",
    "<think>", "</think>", "<answer>", "</answer>", "####", "answer is", r"\begin{pmatrix}", r"\end{pmatrix}", "&",
    r"\\", r"\pm", r"\approx", r"\le", r"\infty", r"\cup", "e", "i", "/", "*", "**", ":", ";", "\n", "\u0301", "\u202e",
    "\0", "\ud800", "½", "√", "²", "°", "𝟙", "٣", "€", "|", "~", "'",
]  # fmt: skip
_CHARACTERS = "{}()[]^_$#*`,.;!%&=+-~|<>\"'\\/ \n\t0x9½√²°€٣\u0301\u202e\u200b\0\ud800😀"


@dataclass(frozen=True)
class Answer:
    """An answer to grade.

    Attributes:
        kind: What was tried.
        response: The response.
        gold: The gold answer.
        verdict: What it must be, if that is known.
    """

    kind: str
    response: str
    gold: str
    verdict: float | None = None


def answers(count: int, seed: int) -> Iterator[Answer]:
    """So many answers; every second one has a known verdict."""
    source = random.Random(seed)
    kinds = list(_HOSTILE.items())
    for index in range(count):
        if index % 2:
            yield _known(source)
            continue
        kind, make = kinds[index // 2 % len(kinds)]
        yield Answer(kind, make(source), _known(source).gold)


def _known(source: random.Random) -> Answer:
    first, second = source.randint(2, 999), source.randint(2, 999)
    forms: list[tuple[str, str]] = [
        *[(str(first), str(first)), (f"{first}.5", rf"{first}.50 \text{{ m}}")] * 6,
        (rf"\frac{{{first}}}{{{first + second}}}", f"{first * 3}/{(first + second) * 3}"),
        (f"({first}, {second})", rf"\left({first}, {second}\right)"),
        (rf"{second}\sqrt{{{first * first * 2}}}", rf"{first * second}\sqrt{{2}}"),
        (f"{first}x + {second}", f"{second} + {first} x"),
        (f"{first}, {first + second}", rf"{first + second} \text{{ and }} {first}"),
    ]
    gold, same = source.choice(forms)
    if source.random() < 0.3:
        return Answer("wrong", rf"So we get $\boxed{{{first + second + 1000}}}$.", gold, 0.0)
    return Answer("right", rf"So we get $\boxed{{{same}}}$.", gold, 1.0)


def _boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def _nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def _tower(source: random.Random) -> str:
    base, height = source.randint(2, 99), source.randint(2, 30)
    powers = {0: "^".join([str(base)] * height), 1: _nested(f"{base}^{{", str(base), "}", height)}
    powers |= {2: "**".join([str(base)] * height), 3: _nested("(", str(base), f"^{base})", height)}
    return _boxed(powers[source.randrange(4)])


def _soup(source: random.Random) -> str:
    text = "".join(source.choices(_FRAGMENTS, k=source.randint(1, 120)))
    return _boxed(text) if source.random() < 0.5 else text


def _spoiled(source: random.Random) -> str:
    """A known answer with characters put in, taken out and doubled."""
    text = list(_known(source).response)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(text))
        text[at] = source.choice([text[at] * 2, "", source.choice(_CHARACTERS), text[at] + source.choice(_CHARACTERS)])
    return "".join(text)


def _run(source: random.Random) -> str:
    """One or two characters or fragments, again and again."""
    text = source.choice([*_CHARACTERS, *_FRAGMENTS]) + source.choice([*_CHARACTERS, *_FRAGMENTS, ""])
    text = text * (source.choice([300, 4000, LONG]) // len(text))
    return _boxed(text) if source.random() < 0.3 else text


def _deep(source: random.Random) -> str:
    opening, closing = source.choice([("{", "}"), ("(", ")"), ("[", "]"), (r"\sqrt{", "}"), (r"\text{", "}"),
                                      (r"\frac{1}{", "}"), ("<think>", "</think>"), ("-", "")])  # fmt: skip
    size = source.choice([100, 590, 5000, LONG])
    return _boxed(_nested(opening, "1", closing, max(size // len(opening + closing), 1)))


_HOSTILE: dict[str, Callable[[random.Random], str]] = {
    "towers": _tower,
    "factorials": lambda s: _boxed(_nested("(", str(s.randint(3, 99999)), ")!", s.randint(1, 5))),
    "digits": lambda s: _boxed(str(s.randint(1, 9)) * s.choice([300, 590, 5000, LONG]) + s.choice(["", "e9", "/7"])),
    "e-notation": lambda s: _boxed(f"1e{s.choice(['', '-'])}{'9' * s.randint(1, 400)}"),
    "soup": _soup,
    "spoiled": _spoiled,
    "runs": _run,
    "deep nesting": _deep,
    "nested boxes": lambda s: _nested(r"\boxed{", str(s.randint(0, 9)), "}", s.choice([2, 50, 1000, LONG // 8])),
    "open boxes": lambda s: r"\boxed{" * s.choice([2, 50, LONG // 7]),
    "combining characters": lambda s: _boxed("1" + "\u0301\u0308" * s.choice([5, 250, LONG // 2])),
    "right-to-left marks": lambda s: _boxed("\u202e" + str(s.randint(1, 99)) + "\u202c" * s.choice([1, 200, LONG])),
    "null bytes": lambda s: "\0" * s.choice([1, LONG]) + _boxed(f"{s.randint(1, 99)}\0"),
    "lone surrogates": lambda s: _boxed(f"{s.randint(1, 99)}\ud800") + "\udfff" * s.choice([0, 1000]),
    "sums": lambda s: _boxed(s.choice(["1+", "x*", "x+", "1/", "2^"]) * s.randint(5, 60) + "1"),
    "big operators": lambda s: _boxed(
        s.choice([r"\sum", r"\prod", r"\int"]) + f"_{{n=1}}^{{{'9' * s.randint(1, 2)}}} n^{{{s.randint(2, 99)}}}"
    ),
    "no answer": lambda s: s.choice(["", " ", "\n", "<think>", r"\boxed{}", r"\boxed", "####", "answer is", "$$"]),
    "exponentials": lambda s: _boxed(_nested("e^{", str(s.randint(2, 9)), "}", s.randint(2, 12))),
    "functions in functions": lambda s: _boxed(
        _nested(s.choice([r"\sin(", r"\log(", r"\exp("]), "x", ")", s.randint(2, 70))
    ),
    "lists": lambda s: _boxed(r"\{" + ",".join(str(s.randint(0, 9)) for _ in range(s.randint(2, 280))) + r"\}"),
}


def endless(source: random.Random) -> Answer:
    """An answer of the kind ``ENDLESS``: functions in functions, compared with a line."""
    text = _nested(source.choice([r"\sin(", r"\log(", r"\exp("]), "x", ")", source.randint(14, 20))
    return Answer(ENDLESS, _boxed(text), f"{source.randint(2, 999)}x + {source.randint(2, 999)}", 0.0)
