"""GSPO: the clipped surrogate with a ratio for each sequence."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rpo_lightning.update.objectives.base import LossInputs, Normalisation
from rpo_lightning.update.objectives.clipped import ClippedObjective, clipped_surrogate


class GSPO(ClippedObjective):
    """Group Sequence Policy Optimization (arXiv 2507.18071).

    The ratio is the geometric mean of the ratios of a sequence's loss tokens. It is close to 1, so the default clipping
    range is narrow.
    """

    normalisation: ClassVar[Normalisation] = "sequence"
    ignores_zero_advantages: ClassVar[bool] = True

    def __init__(
        self, clip_low: float = 3e-4, clip_high: float = 4e-4, beta: float = 0.0, entropy_bonus: float = 0.0
    ) -> None:
        super().__init__(clip_low, clip_high, beta, entropy_bonus)

    def sequence_ratio(self, inputs: LossInputs) -> Tensor:
        """The ratio of each sequence, [B, 1]."""
        difference_BS = (inputs.logprobs_BS - inputs.old_logprobs_BS) * inputs.mask_BS
        lengths_B = inputs.mask_BS.sum(1).clamp(min=1)
        return (difference_BS.sum(1) / lengths_B).exp()[:, None]

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence's clipped surrogate, at each of its tokens."""
        ratio_BS = self.sequence_ratio(inputs).expand_as(inputs.logprobs_BS)
        losses_BS, clipped_BS = clipped_surrogate(ratio_BS, inputs.advantages_BS, self.clip_low, self.clip_high)
        return losses_BS, clipped_BS, ratio_BS
