"""Differences between the rollout engine's log-probs and the trainer's, and a guard that stops on large ones.

Both are log-probs of the same sampled tokens under the same weights, and should differ by rounding only: about 1e-6 in
fp32, about 1e-2 between bf16 kernels. A larger difference means that a weight sync failed in whole or in part.
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
    """Adds up statistics of the differences over the sampled tokens of an update, on the device."""

    def __init__(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)  # tokens, |d|, ratio, ratio², masked
        self._maxima = torch.full((3,), -torch.inf, dtype=torch.float64)  # |d|, ratio, -ratio

    def add(self, difference_BS: Tensor, sampled_BS: Tensor, weights_BS: Tensor) -> None:
        """Add a micro-batch.

        Args:
            difference_BS: Trainer's minus engine's log-probs, [B, S]; 0 where the engine sampled nothing.
            sampled_BS: True at tokens that the engine sampled.
            weights_BS: The importance weights that follow from the differences.
        """
        absolute_BS, ratio_BS = difference_BS.double().abs(), difference_BS.double().exp()
        of_sampled_BS = torch.where(sampled_BS, ratio_BS, 0.0)
        masked_BS = sampled_BS & (weights_BS == 0)
        sums = [
            sampled_BS.sum().double(), absolute_BS.sum(), of_sampled_BS.sum(), of_sampled_BS.square().sum(),
            masked_BS.sum().double(),
        ]  # fmt: skip
        maxima = [torch.where(sampled_BS, x, -torch.inf).amax() for x in (absolute_BS, ratio_BS, -ratio_BS)]
        self._sums = self._sums.to(difference_BS.device) + torch.stack(sums)
        self._maxima = torch.maximum(self._maxima.to(difference_BS.device), torch.stack(maxima))

    def metrics(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Statistics over all ranks, ``mismatch/…``; a collective. Empty if no token was compared.

        ``logprob_…`` are of the |difference| in nats, ``ratio_…`` of its exponential before any truncation.
        ``masked_share`` is the share of tokens whose importance weight is 0.
        """
        ranks = ranks or Ranks()
        tokens, absolute, ratio, square, masked = ranks.sum(self._sums).tolist()
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
            "mismatch/masked_share": masked / tokens,
        }


@dataclass(frozen=True)
class MismatchBound:
    """Mean |differences|, in nats a token, that stop the run.

    Attributes:
        largest: A mean above this stops the run.
        jump: A mean above this many times the median of the last iterations stops the run.
        smallest: A mean up to this never counts as a jump.
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
    """Stops a run whose engine does not sample from the trainer's policy.

    Args:
        bound: See ``MismatchBound``.
    """

    def __init__(self, bound: MismatchBound) -> None:
        self.bound = bound
        self._means: list[float] = []

    def check(self, mean: float, step: int, is_usual: bool = True) -> None:
        """Check an update before the optimizer's step.

        Args:
            mean: Mean |difference| of its sampled tokens, in nats; finite (``rpo_lightning.update.watch`` has an eye
                on those that are not).
            step: Number of the update, for the message.
            is_usual: Whether the mean can be compared with others. That of an update which nothing teaches is of a
                response or so, and means little: it is compared with the largest, and not remembered.

        Raises:
            EngineError: The mean is above the bound.
        """
        usual = median(self._means) if self._means and is_usual else None
        limit = self.bound.largest
        if usual is not None:
            limit = min(limit, max(self.bound.smallest, self.bound.jump * usual))
        if mean > limit:
            before = "" if usual is None else f" (median so far {usual:.2g})"
            raise EngineError(
                f"update {step}: the rollout engine's log-probs differ from the trainer's by {mean:.2g} nats a token "
                f"on average{before}, more than {limit:.2g}: the engine's weights are stale or incomplete, or its "
                "precision is too low. The policy is unchanged. Resume from a checkpoint, or raise "
                "model.update.mismatch_bound if this is expected"
            )
        if is_usual:
            self._means = [*self._means, mean][-_HISTORY:]

    def state_dict(self) -> dict[str, Any]:
        """The means of the last iterations."""
        return {"means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the means of the last iterations."""
        self._means = list(state["means"])
