"""Makes the n-th call of a named function of the real path do something else, such as killing the process."""

from __future__ import annotations

import inspect
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """Something that happens at one call of a function.

    Attributes:
        target: The function: ``module:name`` or ``module:Class.name``.
        call: Which call, from 1.
        when: ``before`` or ``after`` the function has run.
        does: A signal's name, or a function of this module and its argument, as in ``fill /folder``.
        rank: The rank that it happens on.
    """

    target: str
    call: int = 1
    when: str = "before"
    does: str = "SIGKILL"
    rank: int = 0


def set_up(fault: Fault) -> None:
    """Patch the function."""
    if int(os.environ.get("LOCAL_RANK", 0)) != fault.rank:
        return
    module, _, path = fault.target.partition(":")
    holder: Any = import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    original = inspect.getattr_static(holder, name)
    function: Callable[..., Any] = original.__func__ if isinstance(original, staticmethod) else original
    calls = 0
    home = os.getpid()

    def patched(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += os.getpid() == home  # not those of forked workers
        is_due = calls == fault.call and os.getpid() == home
        if is_due and fault.when == "before":
            happen(fault.does)
        result = function(*args, **settings)
        if is_due and fault.when == "after":
            happen(fault.does)
        return result

    setattr(holder, name, staticmethod(patched) if isinstance(original, staticmethod) else patched)


def happen(what: str) -> None:
    """Let it happen."""
    sys.stdout.flush()
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    else:
        name, *arguments = what.split()
        globals()[name](*arguments)


def fail() -> None:
    """Raise an error."""
    raise RuntimeError("this is the cause")


def press_ctrl_c(times: str = "1") -> None:
    """Send what a terminal sends to all processes of a command."""
    for _ in range(int(times)):
        os.killpg(0, signal.SIGINT)


def compute(seconds: str) -> None:
    """Be busy without a word to the other ranks."""
    time.sleep(float(seconds))


def fill(folder: str) -> None:
    """Use up the room of a small file system."""
    with suppress(OSError), (Path(folder) / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_room(folder: str) -> None:
    """Undo ``fill``."""
    (Path(folder) / "filling").unlink()


def mount_again(folder: str, options: str) -> None:
    """Make a file system read-only (``ro``), or writable (``rw``)."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def remove(folder: str) -> None:
    """Remove a folder."""
    shutil.rmtree(folder)


def limit_files(size: str) -> None:
    """Let no file grow beyond a size in bytes; 0 removes the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) or hard, hard))
