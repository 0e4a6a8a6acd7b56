"""Makes the objects that a config names, and tells in one line which class could not be made, and where it is named."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from rpo_lightning.cli.commands import LIGHTNING_COMMANDS
from rpo_lightning.core.errors import ConfigurationError, RPOError, one_line

_PACKAGE = __package__.partition(".")[0]


class ClassMaker:
    """Calls constructors. The parser tries all alternatives of a type, and may forget why one of them failed.

    Args:
        settings: The config whose classes are made.

    Attributes:
        failure: Why the last class that could not be made was not.
        is_done: Whether the config's classes are made. A factory, as of an optimizer, makes its own later.
    """

    def __init__(self, settings: Namespace) -> None:
        self._settings = settings
        self.failure: RPOError | None = None
        self.is_done = False

    def __call__(self, class_type: type, /, *arguments: Any, **named: Any) -> Any:
        """Make an object.

        Raises:
            RPOError: The class refuses its settings, or its constructor raises anything else. What a class of this
                package raises by mistake is raised as it is.
        """
        try:
            return class_type(*arguments, **named)
        except RPOError as error:
            self.failure = error
            raise
        except (Exception, SystemExit) as error:
            if self.is_done or str(class_type.__module__).partition(".")[0] == _PACKAGE:
                raise
            name = f"{class_type.__module__}.{class_type.__qualname__}"
            key = next((key for key, path in _classes(self._settings) if path in (name, class_type.__name__)), None)
            key = key or next((key for key, path in _classes(self._settings) if _last(path) == _last(name)), name)
            said = "" if one_line(error) == type(error).__name__ else f": {one_line(error)}"
            self.failure = ConfigurationError(
                f"{key}: {name} could not be made, its constructor raised {type(error).__name__}{said} "
                f"({_where(error)}): mend the class, or its settings"
            )
            raise self.failure from error


def _classes(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The key and the path of every class that a config names."""
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if isinstance(settings, list | tuple):
        for item in settings:
            yield from _classes(item, key)
    if not isinstance(settings, Mapping):
        return
    if isinstance(settings.get("class_path"), str):
        yield key, settings["class_path"]
    for name, value in settings.items():
        is_shown = name != "init_args" and not (not key and name in LIGHTNING_COMMANDS)
        yield from _classes(value, f"{key}.{name}".lstrip(".") if is_shown else key)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _where(error: BaseException) -> str:
    """The file and line in which an error arose."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    return f"{Path(inspect.getfile(frame)).name}, line {line}"
