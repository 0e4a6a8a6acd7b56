"""The exceptions of the package.

Whatever a user can get wrong raises a subclass of ``RPOError``. Its message is one line: what is wrong, where
(file, row or key), and what to do. The command line prints that line and no traceback.
"""

from __future__ import annotations

import importlib.util


class RPOError(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigurationError(RPOError):
    """A setting or a combination of settings cannot work."""


class DataError(RPOError):
    """A data set cannot be read: missing file, unknown column, malformed row."""


def one_line(error: BaseException) -> str:
    """What an error of another package says, in one line of at most 200 characters; its class if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def own_cause(error: BaseException | None) -> RPOError | None:
    """The error of this package that led to an error, or that it is; ``None`` if there is none."""
    while error is not None and not isinstance(error, RPOError):
        error = error.__cause__ or error.__context__
    return error


def require_modules(extra: str, *names: str, what: str = "") -> None:
    """Check that the modules of an extra are installed.

    Args:
        extra: Name of the extra, for the message.
        names: The modules.
        what: What needs them, for the message.

    Raises:
        ConfigurationError: A module is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        where = f"{what}: " if what else ""
        raise ConfigurationError(f"{where}{missing[0]} is not installed: pip install 'rpo-lightning[{extra}]'")


class CacheError(RPOError):
    """An experience cache is damaged, or belongs to another tokenizer, data set or version."""


class EngineError(RPOError):
    """A rollout engine cannot generate: it is not attached, has stale weights, or crashed."""


class RewardError(RPOError):
    """A reward function cannot be imported, raised, or returned something other than a finite number."""


class UpdateError(RPOError):
    """An update would ruin the policy, for example because its gradient is not finite."""


class CheckpointError(RPOError):
    """A checkpoint cannot be read: it is torn or corrupt."""


class RunFileError(RPOError):
    """A file of the run could not be written: the disk is full, or its folder is gone or read-only."""
