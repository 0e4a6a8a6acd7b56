"""Which part of a program takes its time: seconds of functions, without those of the functions they call."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Parts:
    """Adds up seconds by part. Where parts are nested, seconds count for the inner one."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = self._start = time.perf_counter()

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Count calls of a class's or a module's functions as a part from now on."""
        for name in names:
            setattr(owner, name, self._watched(part, getattr(owner, name)))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count a block as a part."""
        self._switch()
        self._open.append(part)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def take(self) -> tuple[dict[str, float], float]:
        """Seconds of each part since the last call, and seconds in no part; start from zero."""
        self._switch()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        start, self._start = self._start, self._since
        return seconds, self._since - start - sum(seconds.values())

    def _watched(self, part: str, function: Any) -> Any:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return watched

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
