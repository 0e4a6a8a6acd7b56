"""An engine that computes nothing: what is left of an iteration is the trainer's own work."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from rpo_lightning.core.types import Completion
from rpo_lightning.rollout.engine import EngineSetup, GenerationRequest, OnFinished, RolloutEngine, Sampling


class StubEngine(RolloutEngine):
    """Pretends to decode: sleeps, and gives suffixes that were made before.

    Args:
        endings: The suffixes.
        seconds: How long a rollout takes.
        steps: Decoding steps; some sequences end at each.
    """

    def __init__(self, endings: Sequence[list[int]], seconds: float, steps: int = 128) -> None:
        super().__init__()
        self._completions = [Completion(tuple(ids), (-1.0,) * len(ids), True) for ids in endings]
        self._seconds = seconds
        self._steps = steps

    def attach(self, policy: Any, tokenizer: Any, setup: EngineSetup = EngineSetup()) -> None:
        """Nothing to bind."""

    def _copy_weights(self, policy: Any) -> None:
        """Nothing to copy."""

    def prefill_share(self) -> float:
        """Nothing is computed."""
        return 0.0

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Sleep, and draw suffixes."""
        drawn = random.Random(seed)
        found = [[drawn.choice(self._completions) for _ in range(request.n)] for request in requests]
        order = [(index, member) for index, request in enumerate(requests) for member in range(request.n)]
        drawn.shuffle(order)
        for step in range(self._steps):
            time.sleep(self._seconds / self._steps)
            for index, member in order[step :: self._steps]:
                if on_finished is not None:
                    on_finished(index, member, found[index][member])
        return found
