"""Runs in forked processes: libraries are imported once, and every run has its own process, folder and clock."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast


def results_of(tasks: Sequence[tuple[Any, ...]], function: Callable[..., Any], processes: int) -> Iterator[Any]:
    """Call ``function`` with each of ``tasks``, some at a time; yields what the calls return as they end.

    Raises:
        SystemExit: A call failed.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(tasks)
    running: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(function, task, sender))
            process.start()
            sender.close()
            running[receiver] = (process, task)
        for ready in wait(list(running)):
            process, task = running.pop(ready)
            try:
                result = cast(Any, ready).recv()
            except EOFError:
                result = f"exit code {process.exitcode}"
            process.join()
            if isinstance(result, str):
                raise SystemExit(f"{task}: failed\n{result}")
            yield result


def in_folder(folder: Path, *commands: Sequence[str]) -> None:
    """Call the package's command line in a folder; what it prints goes to ``output.txt`` there."""
    from rpo_lightning.cli.main import main

    os.chdir(folder)
    with (folder / "output.txt").open("w") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
        for command in commands:
            main(list(command))


def _call(function: Callable[..., Any], task: tuple[Any, ...], sender: Any) -> None:
    try:
        result = function(*task)
    except BaseException:
        result = traceback.format_exc()[-3000:]
    sender.send(result)
    sender.close()
