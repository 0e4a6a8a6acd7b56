"""The grading processes of a rank: a thread for each, which gives it calls, kills it and starts its successor.

Every process has a connection of its own, and only its thread waits for it. So a process that hangs, crashes or is
killed costs the call that it was making, and nothing else.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rpo_lightning.core.errors import RewardError, one_line
from rpo_lightning.rewards.worker import LostCallError, Worker

# A call that takes longer, in seconds, is slow: a spare process goes on with the others.
_PATIENCE = 1.0
# After so many calls a worker is replaced, with all that libraries have kept in it.
_MOST_CALLS = 1000


@dataclass(frozen=True)
class _Order:
    """A call that waits for a worker."""

    request: bytes
    seconds: float
    future: Future[Any] = field(default_factory=Future)


@dataclass
class _Place:
    """Where a worker is; the lock is held while it makes a call or is replaced."""

    worker: Worker | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Workers:
    """Grading processes with their threads.

    Args:
        count: How many processes grade at a time.
        spare: How many more there are. Each goes on with the other calls while one is slow.
        memory_bytes: How much a process's private memory may grow.
        left_out: Names the tensors that processes do not get, whenever one is started.

    Raises:
        RewardError: No process can be started.
    """

    def __init__(self, count: int, spare: int, memory_bytes: float, left_out: Callable[[], Sequence[Tensor]]) -> None:
        self._memory_bytes = memory_bytes
        self._left_out = left_out
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._turns = threading.Semaphore(count)
        self._is_closed = False
        self._owner = os.getpid()
        self._places = [_Place() for _ in range(count + spare)]
        self._threads = [
            threading.Thread(target=self._supervise, args=(place,), daemon=True, name="grading")
            for place in self._places
        ]
        self.renew()
        for thread in self._threads:
            thread.start()
        _OPEN.add(self)

    def renew(self) -> None:
        """Start workers in place of those that have ended or have made many calls. One that is busy stays."""
        for place in self._places:
            if place.lock.acquire(blocking=False):
                try:
                    self._worker_at(place, _MOST_CALLS)
                finally:
                    place.lock.release()

    def submit(self, request: bytes, seconds: float) -> Future[Any]:
        """Have a worker make a call; the future has what ``Worker.call`` returns or raises."""
        order = _Order(request, seconds)
        self._orders.put(order)
        return order.future

    def close(self) -> None:
        """Kill the workers, and give up what they have not done."""
        if self._is_closed or self._owner != os.getpid():  # a process that was forked from the trainer's has none
            return
        self._is_closed = True
        for place in self._places:
            self._turns.release()
            self._orders.put(None)
            worker = place.worker
            if worker is not None:
                worker.kill()
        for thread in self._threads:
            thread.join()
        while not self._orders.empty():
            self._give_up(self._orders.get())

    def _supervise(self, place: _Place) -> None:
        """Give the worker of a place calls until the end."""
        while True:
            self._turns.acquire()
            order = self._orders.get()
            if order is None or self._is_closed:
                break
            turn = _Turn(self._turns)
            if order.future.set_running_or_notify_cancel():
                with place.lock:
                    self._make(order, place, turn.end)
            turn.end()
        self._give_up(order)
        if place.worker is not None:
            place.worker.close()

    def _make(self, order: _Order, place: _Place, on_slow: Callable[[], None]) -> None:
        """Make a call; whatever happens ends in its future, for which the trainer waits."""
        worker = None
        try:
            worker = self._worker_at(place)
            if self._is_closed:
                raise LostCallError("death", "the pool was closed")
            result = worker.call(order.request, order.seconds, _PATIENCE, on_slow)
        except BaseException as error:
            if worker is not None and isinstance(error, LostCallError):
                worker.close()
                place.worker = None
            order.future.set_exception(error)
        else:
            order.future.set_result(result)

    def _worker_at(self, place: _Place, most_calls: float = float("inf")) -> Worker:
        """The worker of a place; a new one where it has ended or has made so many calls."""
        if place.worker is not None and (place.worker.calls >= most_calls or not place.worker.is_alive):
            place.worker.close()
            place.worker = None
        if place.worker is None:
            try:
                place.worker = Worker(self._memory_bytes, self._left_out())
            except OSError as error:
                raise RewardError(
                    f"a grading process cannot be started: {one_line(error)}; free memory, or lower "
                    "model.grading.workers"
                ) from error
        return place.worker

    @staticmethod
    def _give_up(order: _Order | None) -> None:
        if order is not None:
            order.future.cancel()


class _Turn:
    """The turn of a process, of which so many have one at a time. It ends with its call, or as soon as that is slow."""

    def __init__(self, turns: threading.Semaphore) -> None:
        self._turns = turns
        self._has_ended = False

    def end(self) -> None:
        """Let another process have its turn."""
        if not self._has_ended:
            self._has_ended = True
            self._turns.release()


_OPEN: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Leave no process behind, also where a pool was not closed. Before multiprocessing waits for them."""
    for workers in list(_OPEN):
        workers.close()
