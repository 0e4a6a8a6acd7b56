"""Importance weights for the difference between the rollout engine's policy and the trainer's.

An engine computes the same weights with other kernels, often in a lower precision, so what it sampled
from is not quite the policy that the trainer differentiates. With ``d`` = trainer's minus engine's
log-prob of a sampled token (both under the weights that sampled it), ``exp(d)`` makes the gradient
unbiased, and the truncations below bound its variance. They multiply the policy loss, never the KL
penalty; tokens that the engine did not sample (a kept prefix in the loss scope) weigh 1.

Truncation per token is Yao et al.'s ("Your efficient RL framework secretly brings you off-policy RL
training", 2025), the sequence-level forms Liu et al.'s ("When speed kills stability", 2025).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError


class ImportanceCorrection(ABC):
    """Turns log-prob differences into weights of the policy loss."""

    @abstractmethod
    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """Weight of each loss token.

        Args:
            difference_BS: Trainer's minus engine's log-prob, [B, S]; 0 where nothing was sampled.
            sampled_BS: True at tokens that the engine sampled.

        Returns:
            Weights, [B, S], without gradient.
        """


class NoCorrection(ImportanceCorrection):
    """Take the engine's samples for the policy's."""

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(difference_BS)


class _Capped(ImportanceCorrection):
    """A correction with an upper bound.

    Args:
        cap: Largest weight, at least 1.
    """

    def __init__(self, cap: float) -> None:
        if cap < 1:
            raise ConfigurationError(f"{type(self).__name__}.cap must be at least 1, got {cap}")
        self.cap = cap


class TokenTruncated(_Capped):
    """``min(exp(d_t), cap)`` for each token: biased a little, never loses a sample.

    The default: it is exactly 1 where engine and trainer agree, needs no tuning over response lengths
    (a product over thousands of tokens does), and bounds the variance.
    """

    def __init__(self, cap: float = 2.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """One weight a token."""
        return difference_BS.exp().clamp(max=self.cap)


class SequenceTruncated(_Capped):
    """``min(exp(Σ d_t), cap)`` for all tokens of a sequence: unbiased up to the cap, noisier."""

    def __init__(self, cap: float = 2.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """One weight a sequence, at its sampled tokens."""
        ratio_B = difference_BS.sum(1).exp().clamp(max=self.cap)
        return torch.where(sampled_BS, ratio_B[:, None], torch.ones_like(difference_BS))


class SequenceMasked(_Capped):
    """``exp(Σ d_t)`` where it is at most ``cap``, and 0 for the whole sequence where it is above."""

    def __init__(self, cap: float = 3.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """One weight a sequence; a masked one is out of the loss, kept prefix included."""
        ratio_B = difference_BS.sum(1).exp()
        kept_B1 = (ratio_B <= self.cap)[:, None]
        weights_BS = torch.where(sampled_BS, ratio_B[:, None], torch.ones_like(difference_BS))
        return torch.where(kept_B1, weights_BS, torch.zeros_like(weights_BS))
