"""Importance weights that correct for differences between the rollout engine and the trainer.

The engine uses the trainer's weights with other kernels, often in a lower precision. It therefore samples from a
slightly different policy. Let ``d`` be the trainer's minus the engine's log-prob of a sampled token, both under the
weights that sampled it. Weighting by ``exp(d)`` makes the gradient unbiased; truncation bounds its variance. The
weights multiply the policy loss, not the KL penalty. Tokens that the engine did not sample (a prefix in the loss
scope) weigh 1.

Sources: per token, Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); per
sequence, Liu et al., "When speed kills stability" (2025).
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
        """The weight of each loss token.

        Args:
            difference_BS: Trainer's minus engine's log-prob, [B, S]; 0 where nothing was sampled.
            sampled_BS: True at tokens that the engine sampled, [B, S].

        Returns:
            Weights, [B, S], without gradient.
        """


class NoCorrection(ImportanceCorrection):
    """No correction: treats the engine's samples as the policy's."""

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """A weight of 1 for every token."""
        return torch.ones_like(difference_BS)


class _Capped(ImportanceCorrection):
    """A correction with a largest weight.

    Args:
        cap: Largest weight, at least 1.
    """

    def __init__(self, cap: float) -> None:
        if cap < 1:
            raise ConfigurationError(f"{type(self).__name__}.cap must be at least 1, got {cap}")
        self.cap = cap


class TokenTruncated(_Capped):
    """``min(exp(d_t), cap)`` for each token: slightly biased, and uses every sample.

    This is the default. The weight is 1 where engine and trainer agree. The same cap works for all response lengths,
    unlike a cap on a product over thousands of tokens.
    """

    def __init__(self, cap: float = 2.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """A weight for each token."""
        return difference_BS.exp().clamp(max=self.cap)


class SequenceTruncated(_Capped):
    """``min(exp(Σ d_t), cap)`` for all tokens of a sequence: unbiased up to the cap, but noisier."""

    def __init__(self, cap: float = 2.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """The sequence's weight at its sampled tokens, 1 elsewhere."""
        ratio_B = difference_BS.sum(1).exp().clamp(max=self.cap)
        return torch.where(sampled_BS, ratio_B[:, None], torch.ones_like(difference_BS))


class SequenceMasked(_Capped):
    """``exp(Σ d_t)`` for all tokens of a sequence, or 0 for the whole sequence if it is above ``cap``."""

    def __init__(self, cap: float = 3.0) -> None:
        super().__init__(cap)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """The sequence's weight at its sampled tokens; 0 at all tokens, prefix included, of a masked sequence."""
        ratio_B = difference_BS.sum(1).exp()
        in_loss_B1 = (ratio_B <= self.cap)[:, None]
        weights_BS = torch.where(sampled_BS, ratio_B[:, None], torch.ones_like(difference_BS))
        return torch.where(in_loss_B1, weights_BS, torch.zeros_like(weights_BS))
