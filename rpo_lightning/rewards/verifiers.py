"""Verifiers: mathematical equivalence, exact match, and any function by import path."""

from __future__ import annotations

import itertools
import logging
import math
import re
from typing import Any

from rpo_lightning.core.types import GoldAnswer
from rpo_lightning.rewards.base import AnswerVerifier, Verifier
from rpo_lightning.rewards.functions import import_function

# 4.5e33, which would be read as a multiple of Euler's number.
_EXPONENTIAL = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)")
_MATH_MODE = re.compile(r"(?<!\\)\$")
# So many parts of an answer are matched in every order.
_MOST_ORDERS = 6
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class MathVerifier(AnswerVerifier):
    r"""Mathematical equivalence by ``math-verify``.

    Looks at the last ``<answer>`` block if there is one, else at what follows ``</think>``, else at
    the whole response; a ``\boxed{}`` expression in it has precedence.
    """

    isolated = True

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response's final expression equals the gold answer, or is within its tolerances."""
        given = _parse(final_part(response))
        gold = _parse(_as_latex(answer))
        return float(_equal(gold, given) or (isinstance(answer, GoldAnswer) and _is_within(answer, gold, given)))

    def final_answer(self, response: str) -> list[Any] | None:
        """The final expression and its text."""
        return _parse(final_part(response)) or None

    def same(self, first: list[Any], second: list[Any]) -> bool:
        """Mathematical equivalence in either direction."""
        return first[-1] == second[-1] or _equal(first, second) or _equal(second, first)

    def gold_problem(self, answer: str) -> str | None:
        """Whether math-verify finds an expression in the gold answer."""
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        if answer.strip() and _parse(_as_latex(answer)):
            return None
        return "math-verify finds no expression in it"


class ExactMatchVerifier(AnswerVerifier):
    """String equality of what follows the last marker.

    Args:
        marker: Precedes the answer; a response without it is wrong.
    """

    isolated = False

    def __init__(self, marker: str = "#") -> None:
        self.marker = marker

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 on equality, blanks at the ends aside."""
        given = self.final_answer(response)
        return float(given is not None and self.same(given, answer.strip()))

    def final_answer(self, response: str) -> str | None:
        """What follows the last marker."""
        _, found, given = response.rpartition(self.marker)
        return given.strip() if found else None

    def same(self, first: str, second: str) -> bool:
        """String equality."""
        return first == second


class FunctionVerifier(Verifier):
    """A user's function ``f(prompt, response, answer) -> float`` in [0, 1].

    Args:
        function: Import path, e.g. ``my_package.grading.is_right``.
    """

    isolated = True

    def __init__(self, function: str) -> None:
        self.function = function
        self._call = import_function(function)

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """The function's verdict."""
        return float(self._call(prompt, response, answer))


def final_part(response: str) -> str:
    """The part of a response that should hold the answer."""
    blocks = _ANSWER_BLOCK.findall(response)
    if blocks:
        return str(blocks[-1])
    return response.rpartition("</think>")[2]


def _as_latex(answer: str) -> str:
    r"""Gold answers come bare (``\frac12``), boxed or in dollars; bare ones parse best when boxed."""
    exponential = _EXPONENTIAL.fullmatch(answer.strip())
    if exponential:
        answer = rf"{exponential[1]} \times 10^{{{int(exponential[2])}}}"
    return answer if "\\boxed" in answer or _MATH_MODE.search(answer) else f"\\boxed{{{answer}}}"


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # The pool enforces the limit; math-verify's own alarms would only add signal handlers.
    return list(parse(text, parsing_timeout=None))


def _equal(gold: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, given, timeout_seconds=None))


def _is_within(answer: GoldAnswer, gold: list[Any], given: list[Any]) -> bool:
    """Whether the numbers given can be paired with the gold ones so that each is within its tolerance."""
    golds, found = _numbers(gold), _numbers(given)
    if len(answer.parts) > 1:
        of_parts = [_numbers(_parse(_as_latex(part))) for part in answer.parts]
        golds = [n for numbers in of_parts for n in numbers or [math.nan]]
    if not answer.tolerances or not golds or not found or len(found) != len(golds):
        return False
    limits = answer.tolerances if len(answer.tolerances) == len(golds) else [max(answer.tolerances)] * len(golds)
    is_ordered = len(answer.parts) == 1 and gold[0].__class__.__name__ in ("Tuple", "Interval")
    orders = [found] if is_ordered or len(found) > _MOST_ORDERS else itertools.permutations(found)
    return any(all(abs(g - x) <= limit for g, x, limit in zip(golds, order, limits, strict=True)) for order in orders)


def _numbers(parsed: list[Any]) -> list[float] | None:
    """The numbers of a parsed answer, of which there are several in a set; ``None`` if it is anything else."""
    if not parsed or isinstance(parsed[0], str):
        return None
    expression = parsed[0].rhs if parsed[0].__class__.__name__ == "Equality" else parsed[0]
    kind = expression.__class__.__name__
    if kind == "Interval":  # how (1, 2) is read
        elements = [expression.start, expression.end]
    else:
        elements = list(expression.args) if kind in ("FiniteSet", "Tuple") else [expression]
    if not all(getattr(e, "is_number", False) and getattr(e, "is_real", False) for e in elements):
        return None
    return [float(e) for e in elements]
