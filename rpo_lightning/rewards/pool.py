"""Grading in worker processes that can be killed.

A verifier or a user's reward function can hang (a pathological expression) or crash. Each call has a
hard wall-clock limit; the process of a call that is over it is killed, the call scores 0 and is
counted. The pool is Pebble's; workers are forked, as a DataLoader's are, so that functions defined in
a script work without an import guard.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as GradingTimeout
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from rpo_lightning.core.errors import ConfigurationError, RewardError

log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K")


class GradingPool:
    """A lazily started pool of killable workers.

    Args:
        workers: Number of processes.
        timeout_seconds: Wall-clock limit of one call.

    Attributes:
        killed: Calls that were over the limit or crashed their process, so far.
    """

    def __init__(self, workers: int = 2, timeout_seconds: float = 10.0) -> None:
        if workers < 1 or timeout_seconds <= 0:
            raise ConfigurationError(
                f"grading needs at least 1 worker and a limit above 0 s; got workers={workers}, "
                f"timeout_seconds={timeout_seconds}"
            )
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.killed = 0
        self._pool: ProcessPool | None = None

    def numbers(self, function: Callable[..., float], calls: Sequence[tuple[Any, ...]]) -> list[float]:
        """Call ``function`` with each tuple of arguments.

        Returns:
            The results in order, 0.0 for calls that were killed.

        Raises:
            RewardError: The function raised or did not return a number.
        """
        results = self.map(function, calls, killed=0.0)
        try:
            return [float(result) for result in results]
        except (TypeError, ValueError) as error:
            raise _failure(function, error) from error

    def map(
        self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]], killed: K, limits: float = 1.0
    ) -> list[T | K]:
        """Call ``function`` with each tuple of arguments.

        Args:
            function: What to call.
            calls: Its arguments.
            killed: Stands for the result of a call that was killed.
            limits: How many times the limit a call may take.

        Returns:
            The results in order.

        Raises:
            RewardError: The function raised.
        """
        if self._pool is None:
            self._pool = ProcessPool(max_workers=self.workers, context=multiprocessing.get_context("fork"))
        futures = [self._pool.schedule(function, args=call, timeout=self.timeout_seconds * limits) for call in calls]
        results: list[T | K] = []
        for future in futures:
            # Asked for rather than raised: a worker's SystemExit or KeyboardInterrupt must not end the trainer.
            error = future.exception()
            if error is None:
                results.append(future.result())
            elif isinstance(error, GradingTimeout | ProcessExpired):
                if not self.killed:
                    log.warning(
                        f"grading was killed after {self.timeout_seconds * limits:g} s, or died: such responses count "
                        "as wrong (reward/grading_killed has their number in training, model.grading.timeout_seconds "
                        "is the limit)"
                    )
                self.killed += 1
                results.append(killed)
            else:
                self.close()
                raise _failure(function, error) from error
        return results

    def close(self) -> None:
        """Stop the workers; the next call starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _failure(function: Callable[..., Any], error: BaseException) -> RewardError:
    name = getattr(function, "__qualname__", repr(function))
    said = f": {error}" if str(error) else ""
    return RewardError(f"{name} raised {type(error).__name__}{said}")
