"""Verifiers: mathematical equivalence, exact match, and any function by import path."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from rpo_lightning.rewards.base import Verifier
from rpo_lightning.rewards.functions import import_function

_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class MathVerifier(Verifier):
    r"""Mathematical equivalence by ``math-verify``.

    Looks at the last ``<answer>`` block if there is one, else at what follows ``</think>``, else at
    the whole response; a ``\boxed{}`` expression in it has precedence.
    """

    isolated = True
    finds_answers = True

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response's final expression equals the gold answer, or is within its tolerances."""
        given = _parse(final_part(response))
        tolerances = getattr(answer, "tolerances", ())
        return float(_equal(_parse(_as_latex(answer)), given) or _is_within(tolerances, answer, given))

    def final_answer(self, response: str) -> str | None:
        """The text of the final expression."""
        found = _parse(final_part(response))
        return str(found[-1]) if found else None

    def same(self, first: str, second: str) -> bool:
        """Mathematical equivalence."""
        return _equal(_parse(_as_latex(first)), _parse(_as_latex(second)))

    def gold_problem(self, answer: str) -> str | None:
        """Whether math-verify finds an expression in the gold answer."""
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        if answer.strip() and _parse(_as_latex(answer)):
            return None
        return "math-verify finds no expression in it"


class ExactMatchVerifier(Verifier):
    """String equality of what follows the last marker.

    Args:
        marker: Precedes the answer; a response without it is wrong.
    """

    isolated = False
    finds_answers = True

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
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # The pool enforces the limit; math-verify's own alarms would only add signal handlers.
    return list(parse(text, parsing_timeout=None))


def _equal(gold: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, given, timeout_seconds=None))


def _is_within(tolerances: Sequence[float], answer: str, given: list[Any]) -> bool:
    """Whether the numbers of a gold answer and those given are as many, and each has one within its tolerance."""
    if not tolerances or not given:
        return False
    golds = [_numbers(_parse(_as_latex(part))) for part in answer.split(",")]
    found = _numbers(given)
    if found is None or len(found) != len(golds):
        return False
    limits = list(tolerances) if len(tolerances) == len(golds) else [max(tolerances)] * len(golds)
    return all(
        gold is not None and len(gold) == 1 and any(abs(gold[0] - x) <= limit for x in found)
        for gold, limit in zip(golds, limits, strict=True)
    )


def _numbers(parsed: list[Any]) -> list[float] | None:
    """The numbers of a parsed answer, of which there are several in a set; ``None`` if it is anything else."""
    if not parsed or isinstance(parsed[0], str):
        return None
    elements = list(parsed[0].args) if parsed[0].__class__.__name__ in ("FiniteSet", "Tuple") else [parsed[0]]
    if not all(getattr(e, "is_number", False) and getattr(e, "is_real", False) for e in elements):
        return None
    return [float(e) for e in elements]
