"""How far the rollout engine's log-probs are from the trainer's, and when that means stale weights.

Both are log-probs of the same sampled tokens under the same weights, so they differ by rounding only:
some 1e-6 in fp32, some 1e-2 between bf16 kernels. A weight sync that silently did nothing, or half of
what it should, shows here first.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.ranks import Ranks

_HISTORY = 20


class Mismatch:
    """Sums over the sampled tokens of an update."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # tokens, |d|, ratio, ratio²
        self._maxima = torch.full((3,), -torch.inf, dtype=torch.float64)  # |d|, ratio, -ratio

    def add(self, difference_BS: Tensor, sampled_BS: Tensor) -> None:
        """Take in a micro-batch: trainer's minus engine's log-probs, and where they count."""
        difference_N = difference_BS[sampled_BS].cpu().double()
        if not len(difference_N):
            return
        ratio_N, absolute_N = difference_N.exp(), difference_N.abs()
        count = torch.tensor(float(len(difference_N)), dtype=torch.float64)
        self._sums += torch.stack([count, absolute_N.sum(), ratio_N.sum(), ratio_N.square().sum()])
        maxima = torch.stack([absolute_N.max(), ratio_N.max(), (-ratio_N).max()])
        self._maxima = torch.maximum(self._maxima, maxima)

    def metrics(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Mean and largest |difference| in nats, and statistics of the raw ratio over all ranks; ``mismatch/…``."""
        ranks = ranks or Ranks()
        tokens, absolute, ratio, square = ranks.sum(self._sums).tolist()
        largest, ratio_max, negative_min = ranks.max(self._maxima).tolist()
        if not tokens:
            return {}
        mean = ratio / tokens
        return {
            "mismatch/logprob_mean": absolute / tokens,
            "mismatch/logprob_max": largest,
            "mismatch/ratio_mean": mean,
            "mismatch/ratio_std": max(square / tokens - mean**2, 0.0) ** 0.5,
            "mismatch/ratio_min": -negative_min,
            "mismatch/ratio_max": ratio_max,
        }


@dataclass(frozen=True)
class MismatchBound:
    """When a difference stops the run.

    Attributes:
        largest: Mean |difference| in nats that is never right.
        jump: A mean this many times the median of the last iterations is a sudden change: the weights
            in the engine are not the policy's.
        smallest: A mean below this never counts as a jump.
    """

    largest: float = 0.2
    jump: float = 10.0
    smallest: float = 1e-4

    def __post_init__(self) -> None:
        if self.largest <= 0 or self.jump <= 1 or self.smallest < 0:
            raise ConfigurationError(
                "model.update.mismatch_bound needs largest > 0, jump > 1 and smallest >= 0; got "
                f"{self.largest}, {self.jump} and {self.smallest}"
            )


class MismatchGuard:
    """Stops the run before an update on samples of another policy than the trainer's.

    Args:
        bound: See :class:`MismatchBound`.
    """

    def __init__(self, bound: MismatchBound) -> None:
        self.bound = bound
        self._means: list[float] = []

    def check(self, mean: float, step: int) -> None:
        """Look at the mean |difference| of an update that is about to be made.

        Raises:
            EngineError: It is beyond the bound.
        """
        usual = median(self._means) if self._means else None
        limit = self.bound.largest
        if usual is not None:
            limit = min(limit, max(self.bound.smallest, self.bound.jump * usual))
        # "not <=" so that a NaN stops too.
        if not mean <= limit:
            before = "" if usual is None else f" (median so far {usual:.2g})"
            raise EngineError(
                f"update {step}: the rollout engine's log-probs differ from the trainer's by {mean:.2g} nats a token "
                f"on average{before}, more than {limit:.2g}: its weights are stale or incomplete, or its precision is "
                "too low; the policy was left as it was. Resume from a checkpoint, or raise "
                "model.update.mismatch_bound if this is expected"
            )
        self._means = [*self._means, mean][-_HISTORY:]

    def state_dict(self) -> dict[str, Any]:
        """The last iterations' means."""
        return {"means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._means = list(state["means"])
