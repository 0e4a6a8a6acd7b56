"""CISPO: the importance weight is clipped, and every token keeps its gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rpo_lightning.update.objectives.base import LossInputs, Normalisation
from rpo_lightning.update.objectives.clipped import ClippedObjective


class CISPO(ClippedObjective):
    """Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585).

    The loss of a token is ``-sg(clip(ratio)) · A · log π``, where ``sg`` stops the gradient. As published, the weight
    has no lower bound: ``clip_low`` = 1.
    """

    normalisation: ClassVar[Normalisation] = "token"
    ignores_zero_advantages: ClassVar[bool] = True

    def __init__(
        self, clip_low: float = 1.0, clip_high: float = 0.28, beta: float = 0.0, entropy_bonus: float = 0.0
    ) -> None:
        super().__init__(clip_low, clip_high, beta, entropy_bonus)

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Policy-gradient loss with a clipped weight. A token is clipped if its weight is not its ratio."""
        ratio_BS = (inputs.logprobs_BS.detach() - inputs.old_logprobs_BS).exp()
        weight_BS = ratio_BS.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses_BS = -weight_BS * inputs.advantages_BS * inputs.logprobs_BS
        return losses_BS, weight_BS != ratio_BS, ratio_BS
