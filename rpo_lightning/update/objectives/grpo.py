"""GRPO, DAPO and Dr. GRPO: the clipped surrogate with a ratio for each token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.advantages import AdvantageEstimator, Unscaled
from rpo_lightning.update.objectives.base import LossInputs, Normalisation
from rpo_lightning.update.objectives.clipped import ClippedObjective, clipped_surrogate


class GRPO(ClippedObjective):
    """Group Relative Policy Optimization (arXiv 2402.03300; eqs. 5 and 6 of the RPO paper).

    The loss is the mean over the tokens of a sequence, then over sequences.
    """

    normalisation: ClassVar[Normalisation] = "sequence"
    ignores_zero_advantages: ClassVar[bool] = True

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.0, entropy_bonus: float = 0.0
    ) -> None:
        super().__init__(clip_low, clip_high, beta, entropy_bonus)

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Clipped surrogate with a ratio for each token."""
        ratio_BS = (inputs.logprobs_BS - inputs.old_logprobs_BS).exp()
        losses_BS, clipped_BS = clipped_surrogate(ratio_BS, inputs.advantages_BS, self.clip_low, self.clip_high)
        return losses_BS, clipped_BS, ratio_BS


class DAPO(GRPO):
    """DAPO's loss (arXiv 2503.14476): a higher upper clip, and the mean over all tokens of the update.

    The other parts of DAPO are settings: ``model.dynamic_sampling``, ``model.update.mask_truncated`` (overlong
    filtering) and the ``SoftOverlongPenalty`` reward.
    """

    normalisation: ClassVar[Normalisation] = "token"

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.28, beta: float = 0.0, entropy_bonus: float = 0.0
    ) -> None:
        super().__init__(clip_low, clip_high, beta, entropy_bonus)


class DrGRPO(GRPO):
    """Dr. GRPO (arXiv 2503.20783): a sequence's loss is divided by a constant, not by its length.

    Its advantages are centred and not scaled: ``model.update.advantages`` is ``Unscaled`` if it is not given.

    Args:
        normaliser: The constant, in tokens. As published, it is the response limit.
        clip_low: See ``GRPO``.
        clip_high: See ``GRPO``.
        beta: See ``GRPO``.
        entropy_bonus: See ``GRPO``.
    """

    default_advantages: ClassVar[type[AdvantageEstimator]] = Unscaled
    needs_default_advantages: ClassVar[bool] = True

    def __init__(
        self,
        normaliser: int,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        entropy_bonus: float = 0.0,
    ) -> None:
        if normaliser < 1:
            raise ConfigurationError(f"model.objective: DrGRPO.normaliser must be at least 1 token, got {normaliser}")
        super().__init__(clip_low, clip_high, beta, entropy_bonus)
        self.normaliser = normaliser

    def sequence_weights(self, lengths: Tensor, total_tokens: float, total_sequences: float) -> Tensor:
        """The same weight for all sequences: 1 / (normaliser · total_sequences)."""
        return torch.full_like(lengths, 1.0 / (self.normaliser * max(total_sequences, 1.0)), dtype=torch.float64)
