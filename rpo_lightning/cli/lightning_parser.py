"""Lightning's argument parser with help that people can read: the settings that most runs change come first."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from rpo_lightning.cli.commands import COMMON_SETTINGS, USAGE, Setting
from rpo_lightning.cli.parser import PlainArgumentParser

_FURTHER = (
    "It takes all settings of 'rpo-lightning fit' too, in a config or as arguments.",
    "'rpo-lightning fit --help' lists them.",
)


class RPOArgumentParser(PlainArgumentParser, LightningArgumentParser):
    """The parser of one command. A path given for an argument is a path, not a file of settings to be read.

    Args:
        *args: See ``LightningArgumentParser``.
        command: Name of the command.
        **kwargs: See ``LightningArgumentParser``.

    Attributes:
        own: Settings that the command has and ``fit`` lacks. If there are some, its help lists only them.
    """

    def __init__(self, *args: Any, command: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{"usage": USAGE.format(command=command) if command else None, **kwargs})
        self.command = command
        self.own: list[Setting] = []

    @override
    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})

    def add_own(self, names: set[str]) -> None:
        """List these settings in the help."""
        for action in self._actions:
            if action.dest in names:
                meaning = " ".join((action.help or "").replace("``", "").split())
                self.own.append(Setting(action.dest, meaning, "(required)" if action.required else ""))

    @override
    def format_help(self, *args: Any) -> str:
        head, options, rest = super().format_help(*args).partition("\noptions:\n")
        if self.own:
            lines = ["", "settings of this command:", *self._lines(self.own), "", *_FURTHER, ""]
            return head + "\n".join(lines)
        common = COMMON_SETTINGS.get(self.command)
        if common is None:
            return head + options + rest
        lines = ["", "the settings that most runs change:", *self._lines(common), "", "all settings:", ""]
        return head + "\n".join(lines) + rest

    def _lines(self, settings: Sequence[Setting]) -> list[str]:
        """Name, default and meaning of each setting, in columns."""
        rows = [(f"--{s.name}", s.default or _shown(self.get_default(s.name)), s.meaning) for s in settings]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        indent = sum(widths) + 6
        # Narrow terminals wrap lines by themselves.
        room = max(shutil.get_terminal_size().columns - indent, 30)
        return [
            f"  {name:<{widths[0]}}  {default:<{widths[1]}}  " + f"\n{' ' * indent}".join(textwrap.wrap(meaning, room))
            for name, default, meaning in rows
        ]


def _shown(default: Any) -> str:
    """A default as a config would have it."""
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
