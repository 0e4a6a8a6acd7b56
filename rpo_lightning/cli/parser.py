"""An argument parser whose errors are one line, which also say what renamed settings are called today.

Lightning's is not imported here: ``report`` and ``cache show`` need none of it.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from rpo_lightning.cli.commands import COMMANDS, TOOL_COMMANDS
from rpo_lightning.cli.construction import ClassMaker
from rpo_lightning.core.errors import ConfigurationError, own_cause

_OF_THE_UPDATE = (
    "loss_scope", "mask_truncated", "passes_per_rollout", "minibatches_per_pass", "micro_batch_tokens",
    "share_prefixes", "prefix_gradient", "importance_correction", "mismatch_bound", "max_grad_norm",
    "gradient_checkpointing", "accumulate_sharded",
)  # fmt: skip
_ADVANTAGES = "model.update.advantages (GroupScaled, BatchScaled or Unscaled instead of group, batch or none)"
# Settings that were called otherwise in earlier releases.
RENAMED = {
    **{f"model.{name}": f"model.update.{name}" for name in _OF_THE_UPDATE},
    **{f"{section}.advantage_scale": _ADVANTAGES for section in ("model", "model.update")},
    "model.eval_sampling": "model.evaluation.sampling",
    "model.eval_samples": "model.evaluation.samples",
}

_NO_COMMAND = 'expected "subcommand" to be one of'
_UNKNOWN_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)'")
_RENAMED = re.compile(rf"(?<![\w.])({'|'.join(re.escape(name) for name in RENAMED)})(?!\w)")
_OWN_CLASS = re.compile(r"rpo_lightning(?:\.\w+)*\.(\w+)'")
# What jsonargparse says of the alternatives of a type, besides what is wrong.
_NOISE = re.compile(
    r"(?:- )?(?:Does not validate against|Expected a path but|Expected a <class 'NoneType'>)"
    r"|Subtypes:|Errors:|Given value|Parser key "
)
_UNKNOWN_SETTING = re.compile(r"(?:does not accept option '|unrecognized arguments: )([\w.-]+)")
_REQUIRED = re.compile(
    r"the following arguments are required: (?:(?:fit|validate|test|predict|show|stats)\.)?([\w.]+).*"
)
# The innermost value; those of classes and nested settings are their parser's objects.
_GIVEN = re.compile(r"Given value: ((?!Namespace|NestedArg)[^\n]{1,60})")
# How jsonargparse words what is expected, and plain words for it.
_PLAIN = tuple(
    (re.compile(unplain), plain)
    for unplain, plain in (
        (r"Type typing\.Callable\[.*\] expects a function or a callable class: ", ""),
        (r"Expected a <class 'int'>", "a whole number is expected"),
        (r"Expected a <class 'float'>", "a number is expected"),
        (r"Expected a <class 'bool'>", "true or false is expected"),
        (r"Expected a <class 'str'>", "text is expected"),
        (r"Expected a <class '(?:list|collections\.abc\.\w+)'>", "a list is expected"),
        (r"Expected a typing\.Literal\[([^]]*)\]", r"one of \1 is expected"),
        (r"Import path does not correspond to a subclass of (\w+)", r"a subclass of \1 is expected"),
        (r"Expected '([\w.]+)' to be a subclass of <class '(\w+)'>\.*", r"a subclass of \2 is expected"),
        (
            r"Expected a dot import path string: (\S+?)(?=\.? |\.?$)",
            r"no class of this kind is called \1: name one of the package's, or your own by its import path",
        ),
        (r"is expected (?=a |one of|text|true|no class)", "is expected, or "),
        (r"\.* Got value: Namespace.*", ""),
        (r"\.* Got value: ", ", got "),
    )
)


# Alternatives of a type that a value is not; a class that is one may have refused the value's settings.
_NOT_MEANT = re.compile(r"Expected a|Not of type|Import path")

_is_making: ContextVar[bool] = ContextVar("_is_making", default=False)


class PlainArgumentParser(ArgumentParser):
    """Raises errors as one line, where argparse prints the usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the package's error that caused this one, or an error with the message in one line.

        Raises:
            RPOError: Always, except in the parser of one alternative of a type, which may fail.
        """
        if not self.exit_on_error:  # the parser of an alternative, which may fail
            super().error(message, ex)
        own = own_cause(ex)
        if own is not None:
            raise own
        raise ConfigurationError(in_one_line(message)) from ex

    @override
    def instantiate(self, namespace: Namespace, *args: Any, **settings: Any) -> Namespace:
        """Make the classes that a config names.

        Raises:
            RPOError: One of them could not be made.
        """
        if _is_making.get():  # a nested class, which is made by the call that is going on
            return super().instantiate(namespace, *args, **settings)
        make = ClassMaker(namespace)
        instantiators = {"instantiators": [(make, object, True)]}
        token = _is_making.set(True)
        try:
            made: Namespace = super().instantiate(namespace, *args, **{**instantiators, **settings})
        except Exception:
            if make.failure is not None:
                raise make.failure  # noqa: B904 (it has a cause of its own)
            raise
        finally:
            _is_making.reset(token)
            make.is_done = True
        return made


def of_chosen_class(message: str) -> str:
    """What a class has said of its settings, in a message with what all alternatives of a type say; in one line."""
    told = [line.strip(" -") for line in message.splitlines() if line.strip().startswith("- ")]
    own = [line for line in told if not _NOT_MEANT.match(line)]
    return in_one_line(own[-1] if own else message)


def in_one_line(message: str) -> str:
    """Shorten a message of jsonargparse to one line: the setting, and what is wrong with it.

    A renamed setting's line is its name of today.
    """
    if _NO_COMMAND in message:
        return f"no command given; the commands are {', '.join(COMMANDS)}"
    command = _UNKNOWN_COMMAND.search(message)
    if command and command[1] in TOOL_COMMANDS:
        return f"{command[1]}: write the command first, then its arguments"
    if command:
        return f"{command[1]}: no such command; the commands are {', '.join(COMMANDS)}"
    renamed = _RENAMED.search(message)
    if renamed:
        return f"{renamed[1]} is called {RENAMED[renamed[1]]} now"
    unknown = _UNKNOWN_SETTING.search(message)
    if unknown:
        return f"{unknown[1].lstrip('-')}: no such setting: --help lists those that there are"
    required = _REQUIRED.fullmatch(message.strip())
    if required:
        return f"{required[1]} is not set: give it in a config or as --{required[1]}"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    told = re.sub(r'Parser key "[^"]+":', "\n", message).splitlines()
    told = [line.strip(" -") for line in told if line.strip() and not _NOISE.match(line.strip())]
    problems = [i for i, line in enumerate(told) if line.startswith("Problem with")]
    text = " ".join(told[problems[-1] :] if problems else told)
    given = _GIVEN.search(message)
    for unplain, plain in _PLAIN:
        text = unplain.sub(plain, text)
    if given and text.endswith("is expected"):
        text += f", got {given[1]}"
    moved = _OWN_CLASS.search(text)
    if moved and ("has no attribute" in text or "No module named" in text):
        text += f"; write {moved[1]} alone, which is found wherever it is"
    return f"{key}: {text}" if key else text
