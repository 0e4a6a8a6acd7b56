"""Tells whether what an answer depends on is what it was before: classes, settings, functions, and their source."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from rpo_lightning.core.hashing import short_name

_PACKAGE = __package__.partition(".")[0]


def description(thing: Any) -> tuple[Any, ...]:
    """Describe an object, a function or a class with texts and numbers, equal in every process.

    A function or class of the user's is described by its module, its qualified name and a hash of its source, if that
    can be read; a class by those that it is derived from too. What they call is not looked into.

    Args:
        thing: It. Of an object, settings count: public attributes that are texts, numbers, functions, or objects with
            such, and functions in private ones.
    """
    if isinstance(thing, functools.partial):
        return ("partial", description(thing.func), _setting(thing.args), _setting(thing.keywords))
    if hasattr(thing, "__wrapped__"):
        return description(thing.__wrapped__)
    if inspect.isclass(thing):
        return tuple(_name_and_source(kind) for kind in thing.__mro__ if kind.__module__ not in ("abc", "builtins"))
    if inspect.isroutine(thing):
        owner = getattr(thing, "__self__", None)
        return (_name_and_source(thing), () if owner is None or inspect.ismodule(owner) else description(owner))
    settings = []
    for name, value in sorted(getattr(thing, "__dict__", {}).items()):
        found = _setting(value) if not name.startswith("_") or _is_function(value) else None
        if found is not None:
            settings.append((name, found))
    return (description(type(thing)), tuple(settings))


def _setting(value: Any) -> Any:
    """A value of an object as texts and numbers; ``None`` if it is no setting."""
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return tuple((str(key), _setting(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_setting(item) for item in value)
    if _is_function(value) or type(value).__module__.partition(".")[0] == _PACKAGE or callable(value):
        return description(value)
    return None


def _is_function(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or hasattr(value, "__wrapped__")


def _name_and_source(thing: Any) -> tuple[str, ...]:
    name = (str(thing.__module__), str(getattr(thing, "__qualname__", type(thing).__qualname__)))
    if name[0].partition(".")[0] == _PACKAGE:
        return name  # a release may word it otherwise
    try:
        return (*name, short_name(inspect.getsource(thing)))
    except (OSError, TypeError):
        return name
