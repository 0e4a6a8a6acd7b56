"""Verifiers of short answers: the letters of a multiple choice, and texts."""

from __future__ import annotations

import re
import unicodedata

from rpo_lightning.core.types import GoldAnswer
from rpo_lightning.rewards.answers.cleaning import unwrapped
from rpo_lightning.rewards.answers.extraction import extract, marked_answer
from rpo_lightning.rewards.answers.parts import choice
from rpo_lightning.rewards.base import AnswerVerifier

# A letter alone, in either case.
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:!]?")
# A capital letter at the beginning of an answer that is marked. "A" and "I" before a word may be words themselves.
_FIRST = re.compile(r"(?![AI]\s+(?!because|since)\w)[(\[]?([A-Z])[)\]]?(?=[\s,;:.!?)–—-])")
_BETWEEN = re.compile(r"(?:\s*(?:,|;|&|/|\band\b))+\s*|\s+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DECORATION = " \t\n*_`$\"'"


class ChoiceVerifier(AnswerVerifier):
    """Equality of the letters of a multiple choice, such as ``C``, ``(C)``, ``C. Paris`` or, for several, ``A, C``.

    The answer is what a box, an answer block or "answer is" marks (``rpo_lightning.rewards.answers.extraction``).
    Where nothing marks it, it is a last line that is a letter, or a letter and its text with a bracket, dot or colon
    between them.
    """

    isolated = False

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response chooses the gold letters, in whatever order."""
        given = self.final_answer(response)
        return float(given is not None and given == _letters(_gold(answer), is_marked=True))

    def final_answer(self, response: str) -> str | None:
        """The letters that a response chooses."""
        given = extract(response)
        return None if given is None else _letters(given.text, given.is_marked)

    def same(self, first: str, second: str) -> bool:
        """Whether the letters are equal."""
        return first == second

    def gold_problem(self, answer: str) -> str | None:
        """Why a gold answer is no choice; ``None`` if it is one."""
        if not answer.strip():
            return "it is empty"
        return None if _letters(_gold(answer), is_marked=True) else "it is no letter of a choice, such as C or (C)"


class TextVerifier(AnswerVerifier):
    """Equality of texts, except for case, blanks, punctuation and English articles, as SQuAD compares answers.

    A gold answer that is a list has several right answers; one is enough. Points between digits
    and signs of numbers count.
    """

    isolated = False

    def verify(self, prompt: str, response: str, answer: str) -> float:
        """1.0 if the response's answer is one of the gold ones."""
        given = self.final_answer(response)
        golds = answer.parts if isinstance(answer, GoldAnswer) else (answer,)
        return float(given is not None and given in {_normalised(_gold(gold)) for gold in golds})

    def final_answer(self, response: str) -> str | None:
        """The answer of a response, normalised: what is marked, or all of it after its thoughts."""
        given = extract(response)
        return None if given is None else _normalised(given.text)

    def same(self, first: str, second: str) -> bool:
        """Whether normalised answers are equal."""
        return first == second


def _gold(answer: str) -> str:
    return marked_answer(answer) or answer


def _letters(text: str, is_marked: bool) -> str | None:
    """The letters of a choice in alphabetical order, such as ``A, C``; ``None`` if a text is no choice."""
    if not is_marked:
        text = text.strip().splitlines()[-1]
    text = unicodedata.normalize("NFKC", text)  # full-width letters and brackets
    text = unwrapped(text).strip(_DECORATION)
    alone = [_ALONE.fullmatch(part.strip(_DECORATION)) for part in _BETWEEN.split(text)]
    if all(alone):
        return ", ".join(sorted({letter[1].upper() for letter in alone if letter}))
    found = choice(text)
    if found is not None:
        return found[0]
    first = _FIRST.match(text) if is_marked else None
    return first[1] if first else None


def _normalised(text: str) -> str:
    """A text without what does not count. What would leave nothing of it stays."""
    folded = " ".join(unicodedata.normalize("NFKC", unwrapped(text)).casefold().split())
    folded = folded.replace("\u2212", "-")
    kept = [
        "" if unicodedata.category(c)[0] in "PS" and not _is_of_number(folded, i) else c for i, c in enumerate(folded)
    ]
    plain = " ".join("".join(kept).split()) or folded
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain


def _is_of_number(text: str, i: int) -> bool:
    """Whether a character is a point between digits, or the sign of a number."""
    before, after = text[max(i - 1, 0) : i], text[i + 1 : i + 2]
    return after.isdigit() and (before.isdigit() if text[i] == "." else text[i] == "-" and not before.isalnum())
