"""The entry point of ``rpo-lightning``: finds the command, runs it, and turns errors that users can mend into one line.

Commands are imported when they are called. Torch, Lightning and transformers take seconds to import.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import TextIO, cast

from rpo_lightning.cli.commands import COMMANDS, LIGHTNING_COMMANDS, overview
from rpo_lightning.cli.quiet import silence_libraries
from rpo_lightning.core.errors import ConfigurationError, RPOError

# Where each command's function is.
_FUNCTIONS = {
    **dict.fromkeys(LIGHTNING_COMMANDS, "rpo_lightning.cli.lightning_cli:run"),
    "plan": "rpo_lightning.cli.plan.command:plan",
    "segments": "rpo_lightning.cli.segments.command:segments",
    "cache": "rpo_lightning.cli.cache.command:cache",
    "report": "rpo_lightning.cli.report.report:report",
    "memory": "rpo_lightning.cli.memory.command:memory",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that users can mend end it with one line and exit code 2."""
    try:
        _main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):
            raise  # another pipe is broken, such as one to a process that grades
        # As in `rpo-lightning --help | head`. Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _has_lost_its_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe from which nobody reads any more."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it is no file, or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are told without being asked for
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(overview())
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of the user's own, as with python -m
    _show_own_log()
    silence_libraries()
    try:
        _run(arguments)
    except Exception as error:
        mendable = _find_mendable(error)
        if mendable is None:
            raise
        print(f"rpo-lightning: error: {' '.join(str(mendable).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def _show_own_log() -> None:
    """Print the package's log lines. The root logger stays bare: Lightning logs lines twice if it has handlers."""
    own = logging.getLogger("rpo_lightning")
    own.setLevel(logging.INFO)
    if not own.hasHandlers():
        own.addHandler(logging.StreamHandler())


def _run(arguments: list[str]) -> None:
    """Run a command.

    Raises:
        ConfigurationError: The first argument is no command.
    """
    if not arguments:
        raise ConfigurationError(f"no command given; the commands are {', '.join(COMMANDS)}")
    command = arguments[0]
    if command.startswith("-"):  # Lightning takes options before its commands
        command = "fit"
    elif command not in COMMANDS:
        raise ConfigurationError(f"{command}: no such command; the commands are {', '.join(COMMANDS)}")
    module, function = _FUNCTIONS[command].split(":")
    run: Callable[[list[str]], None] = getattr(import_module(module), function)
    run(arguments if command in LIGHTNING_COMMANDS else arguments[1:])


def _find_mendable(error: BaseException | None) -> BaseException | None:
    """The error that a user can mend, which the argument parser may have wrapped in others."""
    while error is not None and not (isinstance(error, RPOError) or _is_lightnings(error)):
        error = error.__cause__ or error.__context__
    return error


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning refuses a setting; if it was not imported, it did not.

    It raises its own exception, a plain ``ValueError`` from one of its modules, or a plain ``RuntimeError`` from one of
    its callbacks, as ``EarlyStopping`` does for a metric that there is not.
    """
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    if exceptions is None or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    by_lightning = module.startswith("lightning.") and type(error) is ValueError
    by_callback = module.startswith("lightning.pytorch.callbacks.") and type(error) is RuntimeError
    is_misconfigured = isinstance(error, cast(type, exceptions.MisconfigurationException))
    return is_misconfigured or by_lightning or by_callback
