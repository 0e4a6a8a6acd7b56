"""A grading process, as the trainer sees it: started, asked and killed.

It is forked, as a DataLoader's are, so that functions defined in a script work without an import guard
(``rpo_lightning.rewards.serving`` is what runs in it). The two talk through a socket of their own. No other process
waits for it, however a worker ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

from torch import Tensor

from rpo_lightning.rewards.serving import HEADER_BYTES, LARGEST_REPLY, serve
from rpo_lightning.rewards.unshared import unshared

# Why a call has no result: it was over the limit of time or of memory, or its process ended.
Loss = Literal["time", "memory", "death"]

# So often a worker that says nothing is looked at, in seconds: what it has started may keep its socket open.
_LOOK = 0.5
# So long a process that was killed may take to end, in seconds: one that waits for a disk ends later.
_END = 5.0
_CONTEXT = multiprocessing.get_context("fork")
# Held while a worker is started: no other one may inherit the end of the socket that must close when it ends.
_FORKING = threading.Lock()
_TRAINERS_ENDS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class LostCallError(Exception):
    """A call that ended without a result.

    Args:
        loss: Why.
        detail: How its process ended, if it did by itself.
    """

    def __init__(self, loss: Loss, detail: str = "") -> None:
        super().__init__(loss)
        self.loss = loss
        self.detail = detail


class RaisedError(Exception):
    """A call whose function raised; the message has the exception's name, text and line."""


class Worker:
    """A grading process, as the trainer sees it.

    Args:
        memory_bytes: How much its private memory may grow.
        left_out: Tensors that it does not get.

    Attributes:
        calls: Number of calls that it got.
    """

    def __init__(self, memory_bytes: float, left_out: Sequence[Tensor] = ()) -> None:
        self.calls = 0
        # The process goes on within this call, whose argument keeps it from freeing the tensors.
        with _FORKING, unshared(left_out):
            self._socket, theirs = socket.socketpair()
            _TRAINERS_ENDS.add(self._socket)
            arguments = (theirs, list(_TRAINERS_ENDS), memory_bytes, os.getpid())
            self._process = _CONTEXT.Process(target=serve, args=arguments, name="grading")
            self._process.start()
            theirs.close()
        self._pid = self._process.pid or 0
        with suppress(OSError):  # the worker does so too: whichever comes first
            os.setpgid(self._pid, self._pid)
        self._socket.setblocking(False)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        with _FORKING:  # starting one asks for the ends of all, and each end can be asked for once
            return self._process.is_alive()

    def call(self, request: bytes, seconds: float, patience: float, on_slow: Callable[[], None]) -> Any:
        """Have the process call a function.

        Args:
            request: The function and its arguments, pickled.
            seconds: Limit of the call.
            patience: Seconds after which the call is slow.
            on_slow: Called once if it is.

        Raises:
            LostCallError: The call has no result. The process is of no further use.
            RaisedError: The function raised, or its result cannot be sent.
        """
        self.calls += 1
        clock = _Clock(seconds, patience, on_slow)
        try:
            self._send(len(request).to_bytes(HEADER_BYTES) + request, clock)
            size = int.from_bytes(self._receive(HEADER_BYTES, clock))
            if size > LARGEST_REPLY:  # written by the function, not by us
                raise LostCallError("death", "it sent what is no reply")
            kind, *content = pickle.loads(self._receive(size, clock))
        except (ConnectionError, EOFError) as error:
            raise LostCallError("death", self._end()) from error
        except LostCallError:
            raise
        except Exception as error:
            raise RaisedError(f"raised {type(error).__name__}: its result cannot be read") from error
        if kind == "memory":
            raise LostCallError("memory")
        if kind == "raised":
            raise RaisedError(content[0])
        return content[0]

    def kill(self) -> None:
        """End the process and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process, and wait until nothing is left of it."""
        self.kill()
        self._process.join(_END)
        self._socket.close()

    def _send(self, message: bytes, clock: _Clock) -> None:
        rest = memoryview(message)
        while rest:
            self._wait(select.POLLOUT, clock)
            rest = rest[self._socket.send(rest) :]

    def _receive(self, size: int, clock: _Clock) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._wait(select.POLLIN, clock)
            part = self._socket.recv(size - len(received))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _wait(self, event: int, clock: _Clock) -> None:
        """Wait until the socket is ready. A process that has ended is noticed by its socket, or by looking at it."""
        poll = select.poll()
        poll.register(self._socket, event)
        while not poll.poll(1000 * clock.next_look()):
            if not self.is_alive and not poll.poll(0):
                raise EOFError

    def _end(self) -> str:
        """How the process ended."""
        self._process.join(_LOOK)
        code = self._process.exitcode
        if code is None:
            return "it closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class _Clock:
    """The time of a call."""

    def __init__(self, seconds: float, patience: float, on_slow: Callable[[], None]) -> None:
        self._start = time.monotonic()
        self._seconds, self._patience, self._on_slow = seconds, patience, on_slow
        self._is_slow = False

    def next_look(self) -> float:
        """Seconds until something has to be looked at; raises where the limit is reached."""
        taken = time.monotonic() - self._start
        if taken >= self._seconds:
            raise LostCallError("time")
        if not self._is_slow and taken >= self._patience:
            self._is_slow = True
            self._on_slow()
        return min(self._seconds - taken, _LOOK, *(() if self._is_slow else (self._patience - taken,)))
