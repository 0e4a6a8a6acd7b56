"""Grading in worker processes that can be killed.

A verifier or a user's reward function can hang (a pathological expression), crash, or take all memory. Each call has a
hard wall-clock limit, counted from its start in a worker; waiting for a worker does not count. Its worker has a limit
of memory. The process of a call that is over a limit is killed with all that it has started, the call scores 0 and is
counted. So does a call whose process dies or is killed by somebody else.

Calls are submitted as responses end and collected after decoding. Workers are forked before decoding begins
(``GradingPool.start``), while nothing else is computed. Only the successor of a killed worker is forked at another
time. The processes are this package's own (``rpo_lightning.rewards.workers``): those of Pebble and of the standard
library share one connection, so one that is killed or does not listen breaks or delays the others.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError, RewardError, one_line
from rpo_lightning.rewards.serving import told
from rpo_lightning.rewards.worker import Loss, LostCallError, RaisedError
from rpo_lightning.rewards.workers import Workers

log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K")

# More workers than this have hardly anything to do while a rollout lasts seconds, and each takes memory.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Call(Generic[T]):
    """A submitted call.

    Attributes:
        function: What is called.
        seconds: Its limit.
        future: Its result to come.
    """

    function: Callable[..., T]
    seconds: float
    future: Future[T]


class GradingPool:
    """A lazily started pool of killable workers.

    Args:
        workers: Number of processes of each rank; if not given, as many as ``use_cores`` finds cores for, 1 to 8,
            and one more that goes on while a call takes longer than a second.
        timeout_seconds: Wall-clock limit of one call.
        memory_gib: How much memory a process may take beyond what it shares with the trainer; ``.inf`` for no limit.

    Attributes:
        beside_decoding: Whether to grade while others are decoded: only where a core would be idle. Elsewhere both
            would slow each other down, and grading has all cores afterwards.
        killed: Calls that were over a limit or whose process died, so far.
        failed: Scores of 0 for exceptions, so far; see ``on_error`` of ``FunctionReward``.
    """

    def __init__(self, workers: int | None = None, timeout_seconds: float = 10.0, memory_gib: float = 4.0) -> None:
        if (workers is not None and workers < 1) or not timeout_seconds > 0 or not memory_gib > 0:
            raise ConfigurationError(
                "model.grading needs at least 1 worker and limits above 0; got "
                f"workers={workers}, timeout_seconds={timeout_seconds}, memory_gib={memory_gib}"
            )
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.memory_gib = memory_gib
        self.killed = 0
        self.failed = 0
        self.beside_decoding = True
        self._cores = 1
        self._told: set[Loss] = set()
        self._left_out: Callable[[], Sequence[Tensor]] = tuple
        self._workers: Workers | None = None

    def use_cores(self, cores: int, decoding: int) -> None:
        """Learn what there is to grade with. A pool that runs already keeps its workers.

        Args:
            cores: Processor cores of this rank.
            decoding: How many of them are busy while it decodes.
        """
        self.beside_decoding = cores > decoding
        self._cores = cores - decoding if self.beside_decoding else cores

    def leave_out(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        """Keep tensors out of the workers that are started from now on; see ``rpo_lightning.rewards.unshared``.

        Args:
            tensors: Returns the tensors that the trainer writes to. Called whenever a worker is started.
        """
        self._left_out = tensors

    def start(self) -> None:
        """Start the workers, and replace those that have ended or have made many calls.

        Raises:
            RewardError: No process can be started.
        """
        if self._workers is not None:
            self._workers.renew()
            return
        count, spare = (self.workers, 0) if self.workers else (min(max(self._cores, 1), _MOST_WORKERS), 1)
        self._workers = Workers(count, spare, self.memory_gib * 2**30, self._left_out)

    def submit(
        self,
        function: Callable[..., T],
        *arguments: Any,
        limits: float = 1.0,
        named: Mapping[str, Any] | None = None,
    ) -> Call[T]:
        """Have a worker call a function.

        Args:
            function: What to call.
            arguments: Its arguments.
            limits: How many times the limit the call may take.
            named: Its named arguments.

        Raises:
            RewardError: The function or an argument cannot be pickled.
        """
        if self._workers is None:
            self.start()
        assert self._workers is not None
        seconds = self.timeout_seconds * limits
        try:
            request = pickle.dumps((partial(function, **named) if named else function, arguments))
        except Exception as error:
            self.close()
            raise RewardError(f"{_name(function)} cannot be sent to a grading process: {told(error)}") from error
        return Call(function, seconds, self._workers.submit(request, seconds))

    def collect(self, calls: Iterable[Call[T]], killed: K) -> list[T | K]:
        """Wait for submitted calls.

        Args:
            calls: The calls.
            killed: Stands for the result of a call that was killed.

        Returns:
            The results in order.

        Raises:
            RewardError: A function raised; of several failures the first in order. The other calls are cancelled.
        """
        results: list[T | K] = []
        for call in calls:
            error = call.future.exception()
            if error is None:
                results.append(call.future.result())
            elif isinstance(error, LostCallError):
                self._count(call, error)
                results.append(killed)
            else:
                self.close()
                if isinstance(error, RaisedError):
                    raise RewardError(f"{_name(call.function)} {error}") from error
                raise error
        return results

    def collect_numbers(self, calls: Sequence[Call[float]]) -> list[float]:
        """Wait for submitted calls that return numbers.

        Returns:
            The results in order, 0.0 for calls that were killed.

        Raises:
            RewardError: A function raised or did not return a number.
        """
        numbers = []
        for call, result in zip(calls, self.collect(calls, killed=0.0), strict=True):
            try:
                numbers.append(float(result))
            except Exception as error:
                self.close()
                raise RewardError(
                    f"{_name(call.function)} returned {type(result).__name__}, which is no number: {one_line(error)}"
                ) from error
        return numbers

    def numbers(self, function: Callable[..., float], calls: Iterable[tuple[Any, ...]]) -> list[float]:
        """Call ``function`` with each tuple of arguments, and wait; see ``collect_numbers``."""
        return self.collect_numbers([self.submit(function, *call) for call in calls])

    def close(self) -> None:
        """Stop the workers and cancel what they have not done; the next call starts new ones."""
        if self._workers is not None:
            workers, self._workers = self._workers, None
            workers.close()

    def count_failure(self, reason: str) -> None:
        """Count a score of 0 for an exception, and tell of the first."""
        self.failed += 1
        if self.failed == 1:
            log.warning(f"{reason}: such responses count as 0, and reward/grading_failed has their number in training")

    def _count(self, call: Call[Any], error: LostCallError) -> None:
        """Count a call that was lost, and tell of the first of each kind."""
        self.killed += 1
        if error.loss in self._told:
            return
        self._told.add(error.loss)
        what, remedy = {
            "time": (f"was killed after {call.seconds:g} s", "model.grading.timeout_seconds is the limit"),
            "memory": (f"took more than {self.memory_gib:g} GiB", "model.grading.memory_gib is the limit"),
            "death": (f"ended with its process ({error.detail})", "call it by itself to see why"),
        }[error.loss]
        log.warning(
            f"{_name(call.function)} {what}: such responses count as wrong, and reward/grading_killed has their number "
            f"in training ({remedy})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": None, "_left_out": tuple}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
