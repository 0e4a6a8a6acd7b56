"""An argument parser whose errors are one line, which also say what renamed settings are called today.

Lightning's is not imported here: ``report`` and ``cache show`` need none of it.
"""

from __future__ import annotations

import re
from typing import NoReturn

from jsonargparse import ArgumentParser

from rpo_lightning.cli.commands import COMMANDS, TOOL_COMMANDS
from rpo_lightning.core.errors import ConfigurationError, RPOError

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
    r"Does not validate against|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>|Parser key "
)


class PlainArgumentParser(ArgumentParser):
    """Raises errors as one line, where argparse prints the usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the package's error that caused this one, or an error with the message in one line.

        Raises:
            RPOError: Always, except in the parser of one alternative of a type, which may fail.
        """
        if not self.exit_on_error:  # the parser of an alternative, which may fail
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, RPOError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise ConfigurationError(in_one_line(message)) from ex


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
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    told = re.sub(r'Parser key "[^"]+":', "\n", message).splitlines()
    told = [line.strip(" -") for line in told if line.strip() and not _NOISE.match(line.strip())]
    problems = [i for i, line in enumerate(told) if line.startswith("Problem with")]
    text = " ".join(told[problems[-1] :] if problems else told)
    moved = _OWN_CLASS.search(text)
    if moved and ("has no attribute" in text or "No module named" in text):
        text += f"; write {moved[1]} alone, which is found wherever it is"
    return f"{key}: {text}" if key else text
