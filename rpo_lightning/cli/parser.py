"""Argument parsers whose errors are one line, and what settings and classes are called today."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rpo_lightning.core.errors import ConfigurationError, RPOError

_OF_THE_UPDATE = (
    "loss_scope", "advantage_scale", "mask_truncated", "passes_per_rollout", "minibatches_per_pass",
    "micro_batch_tokens", "share_prefixes", "prefix_gradient", "importance_correction", "mismatch_bound",
    "max_grad_norm", "gradient_checkpointing", "accumulate_sharded",
)  # fmt: skip
# Settings that were called otherwise in earlier releases.
RENAMED = {
    **{f"model.{name}": f"model.update.{name}" for name in _OF_THE_UPDATE},
    "model.eval_sampling": "model.evaluation.sampling",
    "model.eval_samples": "model.evaluation.samples",
}

_RENAMED = re.compile(rf"(?<![\w.])({'|'.join(re.escape(name) for name in RENAMED)})(?!\w)")
_OWN_CLASS = re.compile(r"rpo_lightning(?:\.\w+)*\.(\w+)'")
# What jsonargparse says of the alternatives of a type, besides what is wrong.
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>|Parser key "
)


class _OneLineErrors(ArgumentParser):
    """Raises what is wrong as one line, where argparse prints the usage and exits."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error of ours that caused it, or one line made of the message."""
        if not self.exit_on_error:  # the parser of an alternative, which may fail
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, RPOError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise ConfigurationError(in_one_line(message)) from ex


class PlainArgumentParser(_OneLineErrors):
    """The parser of commands that take no policy and no data."""


class RPOArgumentParser(_OneLineErrors, LightningArgumentParser):
    """Lightning's parser, except that a path given for an argument is a path, not a file of settings to be read."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


def in_one_line(message: str) -> str:
    """What jsonargparse says of a wrong setting, with today's names of those that have been renamed."""
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
