"""What runs in a grading process: it answers calls until the trainer closes its end of the socket.

What the process has of the trainer is cut off:

* It is the leader of a process group. What is signalled to the trainer's group (Ctrl-C, a scheduler's SIGTERM) does not
  reach it. Killing it kills what the function has started, too.
* It dies with the thread that forked it, and so with the trainer.
* Its standard streams are the null device: reading gives nothing, and what a function prints is dropped.
* Its private memory may grow by a limit. Beyond that allocations fail, which ends the call.

A message is its length and its bytes, which are pickled: a function with its arguments, or what kind of reply it is and
its content. An exception travels as text, because not every exception can be pickled and read again.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import re
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

HEADER_BYTES = 8
LARGEST_REPLY = 2**24
_OUT_OF_MEMORY = pickle.dumps(("memory",))


def serve(own: socket.socket, trainers: Iterable[socket.socket], memory_bytes: float, trainer: int) -> None:
    """Answer calls, and end the process.

    Args:
        own: The end of the socket that is this process's.
        trainers: Ends of this process's and other workers' sockets that are the trainer's.
        memory_bytes: How much private memory may grow.
        trainer: The trainer's process.
    """
    for end in trainers:
        end.close()
    _leave(trainer)
    _limit_memory(memory_bytes)
    process = os.getpid()
    while header := _read(own, HEADER_BYTES):
        reply = _answer(_read(own, int.from_bytes(header)))
        if os.getpid() != process:  # a child that the function has forked, and that came back from it
            os._exit(0)
        own.sendall(len(reply).to_bytes(HEADER_BYTES) + reply)
    os._exit(0)


def _leave(trainer: int) -> None:
    """Cut off what a worker has of the trainer: its group, its signal handlers, its streams."""
    os.setpgid(0, 0)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != trainer:
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for caught in signal.valid_signals():
        if callable(signal.getsignal(caught)):
            signal.signal(caught, signal.SIG_DFL)
    # Schedulers send these to every process of a job. Handlers, because what is ignored stays ignored after exec.
    for passing in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(passing, lambda *_: None)
    faulthandler.disable()  # it may write to another copy of the terminal
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    # New objects, too: those of a notebook or a test are no files. Text that cannot be encoded is no error.
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = os.fdopen(number, mode, errors="backslashreplace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _limit_memory(memory_bytes: float) -> None:
    """Let private memory grow by so much and no further: what the trainer has, and files that are mapped, is free."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is nothing to keep
    status = Path("/proc/self/status")
    if memory_bytes == float("inf") or not status.exists():
        return
    found = re.search(r"VmData:\s*(\d+) kB", status.read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if found is not None:
        limit = int(found[1]) * 1024 + int(memory_bytes)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes; none at the end."""
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            return b""
        received += part
    return bytes(received)


def _answer(request: bytes) -> bytes:
    """Make a call; whatever it raises is its answer."""
    try:
        function, arguments = pickle.loads(request)
        reply = pickle.dumps(("value", function(*arguments)))
        if len(reply) <= LARGEST_REPLY:
            return reply
        return pickle.dumps(("raised", f"returned {len(reply) / 2**20:.0f} MiB: a verdict or a reward is a number"))
    except BaseException as error:
        return _OUT_OF_MEMORY if is_of_memory(error) else pickle.dumps(("raised", f"raised {told(error)}"))


def is_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that an allocation failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Errors of torch and of the system are of other classes, and say so.
        if isinstance(error, MemoryError) or "allocate memory" in _text(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def told(error: BaseException) -> str:
    """Name, text and line of an exception, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = _text(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except Exception:
        return "an exception without a text"
