"""What a user's function is given: told by the names of its parameters.

A function that takes ``completions`` judges a group at once, as TRL's reward functions do. Every other one judges a
response. Its parameters are ``prompt``, ``response`` and ``answer``, by name or as the first three in this order. All
other parameters are columns of the question's row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample

# What parameters of these names are given. The second names are those of verl's functions.
_OF_A_RESPONSE = {
    "prompt": "prompt", "response": "response", "answer": "answer", "solution_str": "response",
    "ground_truth": "answer",
}  # fmt: skip
_TEXTS = ("prompt", "response", "answer")
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
# TRL gives these names to none of its columns.
_OF_A_BATCH = ("prompts", "completions", "prompt", "completion", "completion_ids")


class Arguments:
    """What a function is given.

    Args:
        function: The function.

    Attributes:
        is_batch: Whether it judges a group at once.
        required: Columns without which it cannot be called.

    Raises:
        ConfigurationError: It takes no response, needs what only TRL has, or its names and their order disagree.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = _parameters(function)
        named = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        self._takes_row = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        self.is_batch = "completions" in named
        self._texts: dict[str, str] | None = None  # parameter: what it is given; None: the first three, in order
        self._takes_prompts = self._takes_row or "prompts" in named
        if self.is_batch:
            self._given = set(_OF_A_BATCH)
            _require_known(function, parameters)
        elif named & {"response", "solution_str"}:
            self._texts = {name: text for name, text in _OF_A_RESPONSE.items() if name in named}
            self._given = {*_TEXTS, *self._texts}
        else:
            first = [p.name for p in parameters if p.kind in _POSITIONAL]
            if len(first) < len(_TEXTS) and Parameter.VAR_POSITIONAL not in {p.kind for p in parameters}:
                names = ", ".join(parameter.name for parameter in parameters)
                raise ConfigurationError(
                    f"{name_of(function)}({names}) takes no response: name a parameter response or completions, or "
                    "take prompt, response and answer in this order"
                )
            _require_order(function, first)
            self._given = {*_TEXTS, *first[: len(_TEXTS)]}
        columns = [p for p in parameters if p.name in named - self._given]
        self._columns = [p.name for p in columns]
        self._takes_answer = self.is_batch and "answer" in self._columns
        gold = {"answer"} if self.is_batch else set()  # the gold answer, where there is no such column
        self.required = [p.name for p in columns if p.default is Parameter.empty and p.name not in gold]

    def problem(self, row: Mapping[str, Any], who: str) -> str | None:
        """What a row lacks of the columns without which ``who`` cannot be called; ``None`` if nothing."""
        missing = next((name for name in self.required if name not in row), None)
        if missing is None:
            return None
        return (
            f"no column {missing!r}, which {who} takes; it has {', '.join(sorted(row)) or 'none'}: add the column, or "
            "give the parameter a default"
        )

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row that it takes."""
        names = [name for name in row if name not in self._given] if self._takes_row else self._columns
        return {name: row[name] for name in names if name in row}

    def of_response(
        self, prompt: str, response: str, answer: str, columns: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The positional and the named arguments with which it judges a response."""
        texts = {"prompt": prompt, "response": response, "answer": answer}
        if self._texts is None:
            return tuple(texts.values()), dict(columns)
        return (), {**{name: texts[text] for name, text in self._texts.items()}, **columns}

    def of_sample(self, sample: Sample) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The positional and the named arguments with which it judges a sample."""
        return self.of_response(sample.prompt, sample.response, sample.answer, self.columns(sample.row))

    def of_group(self, group: Sequence[Sample]) -> dict[str, Any]:
        """The named arguments with which it judges a group at once, a list each, as TRL gives them.

        Where the column ``prompt`` holds messages, prompts and completions are messages, too. ``answer`` is the column
        of this name, and the gold answer where there is none.
        """
        row = group[0].row
        columns = self.columns(row)
        if self._takes_answer:
            columns.setdefault("answer", group[0].answer)
        prompts: list[Any] = [s.prompt for s in group]
        completions: list[Any] = [s.response for s in group]
        if isinstance(row.get("prompt"), list):
            prompts = [row["prompt"]] * len(group)
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        lists = {name: [value] * len(group) for name, value in columns.items()}
        given = {"prompts": prompts} if self._takes_prompts else {}
        return {**given, "completions": completions, **lists}


def name_of(function: Callable[..., Any]) -> str:
    """A function's own name; an object's class."""
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def _require_known(function: Callable[..., Any], parameters: Sequence[Parameter]) -> None:
    """Check that a function of a batch can be called without what TRL alone has."""
    for p in parameters:
        if p.name in ("prompt", "completion", "completion_ids") and p.default is Parameter.empty:
            raise ConfigurationError(
                f"{name_of(function)} takes {p.name!r}, which functions of a batch are not given: take prompts and "
                "completions, or give the parameter a default"
            )


def _require_order(function: Callable[..., Any], names: Sequence[str]) -> None:
    """Check that no parameter would be given, by its place, something else than its name says."""
    for name, text in zip(names, _TEXTS, strict=False):
        said = "response" if name == "completion" else _OF_A_RESPONSE.get(name, text)
        if said != text:
            raise ConfigurationError(
                f"{name_of(function)}({', '.join(names)}) would be given the {text} as {name!r}: name the parameter of "
                "the response response, then the order does not matter, or take prompt, response and answer in this "
                "order"
            )


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    inner = inspect.unwrap(function)
    fixed = inner.keywords if isinstance(inner, functools.partial) else {}
    try:
        return [p for p in inspect.signature(function).parameters.values() if p.name not in fixed]
    except ValueError:  # some functions written in C do not tell
        return [Parameter(name, Parameter.POSITIONAL_ONLY) for name in _TEXTS]
