"""The one exception hierarchy of the package.

Everything a user can get wrong raises a subclass of :class:`RPOError` whose message is a single
line saying what is wrong, where (file, row or key), and what to do. The command line prints that
line and nothing else.
"""

from __future__ import annotations

import importlib.util


class RPOError(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigurationError(RPOError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(RPOError):
    """A data set that cannot be read: missing file, unknown column, malformed row."""


def require_modules(extra: str, *names: str) -> None:
    """Check that the modules of an extra are installed.

    Raises:
        ConfigurationError: One is not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"{missing[0]} is not installed: pip install 'rpo-lightning[{extra}]'")


class CacheError(RPOError):
    """An experience cache that does not belong to this tokenizer, data set or version."""


class EngineError(RPOError):
    """A rollout engine that cannot generate: not attached, stale weights, crashed."""


class RewardError(RPOError):
    """A reward function that cannot be imported, or that raised or returned nonsense."""


class UpdateError(RPOError):
    """An update that would have ruined the policy, such as a gradient that is not finite."""
