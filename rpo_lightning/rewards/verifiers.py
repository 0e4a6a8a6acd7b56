"""Verifiers: mathematical equivalence, exact match, and any function by import path."""

from __future__ import annotations

import logging
import re

from rpo_lightning.rewards.base import Verifier
from rpo_lightning.rewards.functions import import_function

_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class MathVerifier(Verifier):
    r"""Mathematical equivalence by ``math-verify``.

    Looks at the last ``<answer>`` block if there is one, else at what follows ``</think>``, else at
    the whole response; a ``\boxed{}`` expression in it has precedence.
    """

    isolated = True

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response's final expression equals the gold answer."""
        from math_verify import parse, verify

        # The pool enforces the limit; math-verify's own alarms would only add signal handlers.
        gold = parse(_as_latex(answer), parsing_timeout=None)
        given = parse(final_part(response), parsing_timeout=None)
        return float(verify(gold, given, timeout_seconds=None))

    def gold_problem(self, answer: str) -> str | None:
        """Whether math-verify finds an expression in the gold answer."""
        from math_verify import parse

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        if answer.strip() and parse(_as_latex(answer), parsing_timeout=None):
            return None
        return "math-verify finds no expression in it"


class ExactMatchVerifier(Verifier):
    """String equality of what follows the last marker.

    Args:
        marker: Precedes the answer; a response without it is wrong.
    """

    isolated = False

    def __init__(self, marker: str = "#") -> None:
        self.marker = marker

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 on equality, blanks at the ends aside."""
        _, found, given = response.rpartition(self.marker)
        return float(bool(found) and given.strip() == answer.strip())


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
