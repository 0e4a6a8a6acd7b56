"""Grading in worker processes that can be killed.

A verifier or a user's reward function can hang (a pathological expression) or crash. Each call has a hard wall-clock
limit, counted from its start in a worker; waiting for a worker does not count. The process of a call that is over the
limit is killed, the call scores 0 and is counted.

Calls are submitted as responses end and collected after decoding. The pool is Pebble's. Workers are forked, as a
DataLoader's are, so that functions defined in a script work without an import guard. They are forked before decoding
begins (``GradingPool.start``), while nothing else is computed. Only the successor of a killed worker is forked at
another time.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as GradingTimeout
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pebble import ProcessExpired, ProcessPool

from rpo_lightning.core.errors import ConfigurationError, RewardError

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
        workers: Number of processes of each rank; if not given, as many as ``use_cores`` finds cores for, 1 to 8.
        timeout_seconds: Wall-clock limit of one call.

    Attributes:
        beside_decoding: Whether to grade while others are decoded: only where a core would be idle. Elsewhere both
            would slow each other down, and grading has all cores afterwards.
        killed: Calls that were over the limit or crashed their process, so far.
    """

    def __init__(self, workers: int | None = None, timeout_seconds: float = 10.0) -> None:
        if (workers is not None and workers < 1) or timeout_seconds <= 0:
            raise ConfigurationError(
                f"grading needs at least 1 worker and a limit above 0 s; got workers={workers}, "
                f"timeout_seconds={timeout_seconds}"
            )
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.killed = 0
        self.beside_decoding = True
        self._cores = 1
        self._pool: ProcessPool | None = None

    def use_cores(self, cores: int, decoding: int) -> None:
        """Learn what there is to grade with. A pool that runs already keeps its workers.

        Args:
            cores: Processor cores of this rank.
            decoding: How many of them are busy while it decodes.
        """
        self.beside_decoding = cores > decoding
        self._cores = cores - decoding if self.beside_decoding else cores

    def start(self) -> None:
        """Start the workers, unless they run already."""
        if self._pool is None:
            workers = self.workers or min(max(self._cores, 1), _MOST_WORKERS)
            self._pool = ProcessPool(max_workers=workers, context=multiprocessing.get_context("fork"))
            self._pool.schedule(bool)  # Pebble forks its workers at the first call

    def submit(self, function: Callable[..., T], *arguments: Any, limits: float = 1.0) -> Call[T]:
        """Have a worker call a function.

        Args:
            function: What to call.
            arguments: Its arguments.
            limits: How many times the limit the call may take.
        """
        self.start()
        assert self._pool is not None
        seconds = self.timeout_seconds * limits
        return Call(function, seconds, self._pool.schedule(function, args=arguments, timeout=seconds))

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
            # Asked for rather than raised: a worker's SystemExit or KeyboardInterrupt must not end the trainer.
            error = call.future.exception()
            if error is None:
                results.append(call.future.result())
            elif isinstance(error, GradingTimeout | ProcessExpired):
                if not self.killed:
                    log.warning(
                        f"grading was killed after {call.seconds:g} s, or died: such responses count "
                        "as wrong (reward/grading_killed has their number in training, model.grading.timeout_seconds "
                        "is the limit)"
                    )
                self.killed += 1
                results.append(killed)
            else:
                self.close()
                raise _failure(call.function, error) from error
        return results

    def collect_numbers(self, calls: Sequence[Call[float]]) -> list[float]:
        """Wait for submitted calls that return numbers.

        Returns:
            The results in order, 0.0 for calls that were killed.

        Raises:
            RewardError: A function raised or did not return a number.
        """
        results = self.collect(calls, killed=0.0)
        try:
            return [float(result) for result in results]
        except (TypeError, ValueError) as error:
            raise _failure(calls[0].function, error) from error

    def numbers(self, function: Callable[..., float], calls: Iterable[tuple[Any, ...]]) -> list[float]:
        """Call ``function`` with each tuple of arguments, and wait; see ``collect_numbers``."""
        return self.collect_numbers([self.submit(function, *call) for call in calls])

    def close(self) -> None:
        """Stop the workers and cancel what they have not done; the next call starts new ones."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _failure(function: Callable[..., Any], error: BaseException) -> RewardError:
    name = getattr(function, "__qualname__", repr(function))
    said = f": {error}" if str(error) else ""
    return RewardError(f"{name} raised {type(error).__name__}{said}")
