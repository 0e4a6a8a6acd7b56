"""Seconds of each phase of an iteration.

Phases: ``initialise`` (filling the cache before training), ``prefill`` and ``decode`` (the rollout), ``reward``,
``old_logprobs``, ``reference_logprobs``, ``update``, ``sync``, ``cache``, and ``rest`` (the iteration's remaining
time). A nested phase's seconds count for the inner phase only, so the phases add up to the iteration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = (
    "initialise", "prefill", "decode", "reward", "old_logprobs", "reference_logprobs", "update", "sync", "cache",
    "rest",
)  # fmt: skip


class PhaseTimer:
    """Adds up wall-clock seconds by phase until ``take`` returns them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._paused: dict[str, float] = {}
        self._inner: list[float] = []  # for each open phase, the seconds of the phases nested in it
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block. Waits for the CUDA work that the block launched."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            self._add(phase, elapsed - self._inner.pop())
            if self._inner:
                self._inner[-1] += elapsed

    def move(self, source: str, target: str, share: float) -> None:
        """Move a share (0 to 1) of one phase's seconds to another phase."""
        seconds = self._seconds.get(source, 0.0) * share
        self._add(source, -seconds)
        self._add(target, seconds)

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, ``rest`` included, and start from zero."""
        taken, self._seconds = self._seconds, {}
        now = time.perf_counter()
        taken["rest"] = max(now - self._since - sum(taken.values()), 0.0)
        self._since = now
        return taken

    def pause(self) -> None:
        """Set the seconds so far aside before work that is not part of an iteration."""
        self._paused = self.take()

    def resume(self) -> None:
        """Drop the seconds since ``pause`` and continue from the seconds set aside."""
        self._since = time.perf_counter() - sum(self._paused.values())
        self._paused.pop("rest")
        self._seconds = self._paused

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
