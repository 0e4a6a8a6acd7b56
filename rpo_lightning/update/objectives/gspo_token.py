"""GSPO-token: GSPO's ratio for each sequence, with a gradient for each token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rpo_lightning.update.objectives.base import LossInputs
from rpo_lightning.update.objectives.clipped import clipped_surrogate
from rpo_lightning.update.objectives.gspo import GSPO


class GSPOToken(GSPO):
    """GSPO-token (arXiv 2507.18071, section 4.3).

    The ratio of token t of sequence i has the value of GSPO's sequence ratio ``s_i`` and the gradient of its own token,
    where ``sg`` stops gradients:

        s_it = sg[s_i] · π(y_it) / sg[π(y_it)]

    Value and gradient are GSPO's where all tokens of a sequence have the same advantage and importance weight. Where
    they differ, each token's gradient goes with its own, while GSPO spreads their mean over the sequence. Estimators of
    this package give a sequence one advantage; importance weights differ by token with ``TokenTruncated`` (the default)
    and ``IcePop``.
    """

    ignores_zero_advantages: ClassVar[bool] = True

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The clipped surrogate of each token."""
        own_BS = (inputs.logprobs_BS - inputs.logprobs_BS.detach()).exp()
        ratio_BS = self.sequence_ratio(inputs).detach() * own_BS
        losses_BS, clipped_BS = clipped_surrogate(ratio_BS, inputs.advantages_BS, self.clip_low, self.clip_high)
        return losses_BS, clipped_BS, ratio_BS
