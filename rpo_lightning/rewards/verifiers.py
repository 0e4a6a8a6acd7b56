"""Verifiers: mathematical equivalence, exact match, and any function."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, cast

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import GoldAnswer
from rpo_lightning.rewards.answers.cleaning import clean
from rpo_lightning.rewards.answers.equality import equal, is_only_text
from rpo_lightning.rewards.answers.expressions import as_float, found_by_math_verify
from rpo_lightning.rewards.answers.extraction import Extracted, extract, marked_answer
from rpo_lightning.rewards.answers.golds import no_gold
from rpo_lightning.rewards.answers.parts import several, without_name
from rpo_lightning.rewards.arguments import Arguments
from rpo_lightning.rewards.base import AnswerVerifier, Verifier
from rpo_lightning.rewards.functions import OnError, UserFunction

# So many parts of an answer are matched in every order.
_MOST_ORDERS = 6
# A longer text is prose about the answer rather than the answer.
_LONGEST_BARE_ANSWER = 120


class MathVerifier(AnswerVerifier):
    r"""Mathematical equivalence; ``docs/answers.md`` says how answers are read and compared.

    The same rules read the gold answer and the response (``rpo_lightning.rewards.answers.extraction``). Expressions
    that are more than numbers, words and lists are compared by ``math-verify``.
    """

    isolated = True

    def prepare(self) -> None:
        """Import math-verify, which takes a second: the successor of a killed worker need not."""
        importlib.import_module("math_verify")

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response's answer equals the gold one, or is within its tolerances."""
        given, gold = extract(response), _marked(answer)
        if given is None:
            return 0.0
        return float(any(_equal_within(answer, gold, text) for text in _readings(given)))

    def final_answer(self, response: str) -> str | None:
        """The answer of a response as text. Prose in which nothing is marked or found has none."""
        given = extract(response)
        if given is None:
            return None
        readings = _readings(given)
        return None if readings == [given.text] and not given.is_marked and " " in given.text else readings[-1]

    def same(self, first: str, second: str) -> bool:
        """Equality in either direction."""
        return equal(first, second) or equal(second, first)

    def gold_problem(self, answer: str) -> str | None:
        """Why a gold answer cannot be compared with; ``None`` if it can."""
        gold = _marked(answer)
        if not answer.strip():
            return "it is empty"
        return no_gold(gold) or (None if equal(gold, gold) else "it is not equal to itself")

    def is_only_text(self, answer: str) -> bool:
        """Whether nothing but its own text equals a gold answer."""
        return is_only_text(_marked(answer))


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
    """A user's function that judges a response with a number in [0, 1].

    Its signature says what it is given (``docs/rewards.md``).

    Args:
        function: The function, or its import path, e.g. ``my_package.grading.is_right``.
        on_error: What an exception of the function does: ``stop`` the run, or count as wrong (``zero``).

    Raises:
        ConfigurationError: The function judges a group at once.
    """

    isolated = True

    def __init__(self, function: str | Callable[..., Any], on_error: OnError = "stop") -> None:
        self.function = function
        self._call = UserFunction(function, on_error)
        if self._call.arguments.is_batch:
            raise ConfigurationError(
                f"FunctionVerifier({self._call.name}) takes completions, and a verifier judges one response: name the "
                "parameter response"
            )

    @property
    def arguments(self) -> Arguments:
        """Those of the function."""
        return self._call.arguments

    def verify(self, /, prompt: str, response: str, answer: str, **row: Any) -> float:
        """The function's verdict."""
        texts, named = self.arguments.of_response(prompt, response, answer, row)
        return cast(float, self._call(*texts, **named))


def _marked(answer: str) -> str:
    """What a box or ``####`` marks in a gold answer; all of it if neither does."""
    return marked_answer(answer) or answer


def _readings(given: Extracted) -> list[str]:
    """What a response's answer may be: its text, and if nothing marks that, also what math-verify finds in it."""
    if given.is_marked:
        return [given.text]
    found = found_by_math_verify(given.text)
    if found is None:
        return [given.text]
    return [found] if len(given.text) > _LONGEST_BARE_ANSWER else [given.text, found]


def _equal_within(answer: str, gold: str, given: str) -> bool:
    return equal(gold, given) or (
        isinstance(answer, GoldAnswer) and bool(answer.tolerances) and _is_within(answer, given)
    )


def _is_within(answer: GoldAnswer, given: str) -> bool:
    """Whether the numbers given can be paired with the gold ones so that each is within its tolerance."""
    golds = [as_float(clean(part)) for part in answer.parts]
    text = without_name(clean(given))
    if len(golds) == 1:
        split = several(without_name(clean(answer.parts[0])))
        golds = [as_float(clean(part)) for part in split.parts] if split else golds
        is_ordered = split is not None and split.is_ordered
    else:
        is_ordered = False
    parts = several(text)
    found = [as_float(clean(part)) for part in parts.parts] if parts else [as_float(text)]
    if len(found) != len(golds) or None in found or None in golds:
        return False
    limits = answer.tolerances if len(answer.tolerances) == len(golds) else [max(answer.tolerances)] * len(golds)
    orders = [tuple(found)] if is_ordered or len(found) > _MOST_ORDERS else itertools.permutations(found)
    return any(
        all(abs(cast(float, g) - cast(float, x)) <= limit for g, x, limit in zip(golds, order, limits, strict=True))
        for order in orders
    )
