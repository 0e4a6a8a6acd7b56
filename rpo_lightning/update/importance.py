"""Importance weights that correct for differences between the rollout engine and the trainer.

The engine uses the trainer's weights with other kernels, often in a lower precision. It therefore samples from a
slightly different policy. Let ``d`` be the trainer's minus the engine's log-prob of a sampled token, both under the
weights that sampled it. Weighting by ``exp(d)`` makes the gradient unbiased; truncation bounds its variance. The
weights multiply the policy loss, not the KL penalty. Tokens that the engine did not sample (a prefix in the loss
scope) weigh 1.

Sources: per token, Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); per
sequence, Liu et al., "When speed kills stability" (2025); IcePop, arXiv 2510.18855.
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


class _Bounded(ImportanceCorrection):
    """A correction that masks what is outside a range around 1.

    Args:
        lower: Smallest ratio that is kept, from 0 to 1.
        upper: Largest ratio that is kept, at least 1; ``.inf`` for no bound.
    """

    def __init__(self, lower: float, upper: float) -> None:
        if not 0 <= lower <= 1 <= upper:
            raise ConfigurationError(
                f"{type(self).__name__} needs 0 <= lower <= 1 <= upper, got lower={lower} and upper={upper}"
            )
        self.lower = lower
        self.upper = upper

    def _keeps(self, ratio: Tensor) -> Tensor:
        return (ratio >= self.lower) & (ratio <= self.upper)


class IcePop(_Bounded):
    """``ρ_t = exp(d_t)`` for each token, or 0 if it is outside ``[lower, upper]`` (Ring-1T, arXiv 2510.18855).

    The formula is ``1[lower <= ρ <= upper] · ρ``. Tokens on which engine and trainer disagree most are left out instead
    of being truncated, also those that the trainer finds much less likely. The default bounds are the paper's. Here ρ
    compares engine and trainer under the weights that sampled, as in the paper; prime-rl takes the current weights.
    """

    def __init__(self, lower: float = 0.5, upper: float = 5.0) -> None:
        super().__init__(lower, upper)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """The ratio of each token, 0 where it is masked."""
        ratio_BS = difference_BS.exp()
        return torch.where(self._keeps(ratio_BS), ratio_BS, torch.zeros_like(ratio_BS))


class GeometricMasked(_Bounded):
    """1 for all tokens of a sequence, or 0 if the geometric mean of its ratios is outside ``[lower, upper]``.

    The formula is ``1[lower <= exp(1/n · Σ d_t) <= upper]`` over the n sampled tokens of a sequence: Liu et al.'s
    geometric mask. Unlike a product, the mean does not drop long sequences for being long. It leaves out sequences that
    another policy seems to have sampled, and does not reweight the others, as in verl. So a small bias stays.

    verl's bounds, 0.999 and 1.001, suit responses of thousands of tokens. The mean over n tokens whose differences have
    the standard deviation s varies by s/√n: by 0.006 with a suffix of 64 tokens and s = 0.05, about what an engine in
    bf16 has. Hence the wider default. The metric ``mismatch/masked_share`` shows what is masked.
    """

    def __init__(self, lower: float = 0.98, upper: float = 1.02) -> None:
        super().__init__(lower, upper)

    def weights(self, difference_BS: Tensor, sampled_BS: Tensor) -> Tensor:
        """1 for all tokens of a sequence that is kept, 0 for all tokens, prefix included, of a masked one."""
        count_B = sampled_BS.sum(1).clamp(min=1)
        keeps_B = self._keeps((difference_BS.sum(1) / count_B).exp())
        return keeps_B[:, None].expand_as(difference_BS).to(difference_BS.dtype)
