"""SAPO: a soft gate of the ratio instead of clipping."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.objectives.base import LossInputs, Normalisation, Objective


class SAPO(Objective):
    """Soft Adaptive Policy Optimization (arXiv 2511.20347).

    With the ratio ``r_t`` of a token, the loss is ``-f(r_t) · A`` with the gate:

        f(r) = 4/τ · σ(τ · (r - 1)),    τ = tau_pos where A > 0, tau_neg elsewhere

    The gate's gradient is ``r · 4 p (1 - p)`` times that of ``log π``, with ``p = σ(τ · (r - 1))``: the plain gradient
    at a ratio of 1, which fades where the ratio is far from it. No token is clipped. The mean is over the tokens of a
    sequence, then over sequences.

    Args:
        tau_pos: Temperature of tokens with a positive advantage; the higher, the narrower the gate.
        tau_neg: Temperature of all other tokens. As published, it is the higher one.
        beta: See ``Objective``.
        entropy_bonus: See ``Objective``.
    """

    normalisation: ClassVar[Normalisation] = "sequence"
    ignores_zero_advantages: ClassVar[bool] = True

    def __init__(
        self, tau_pos: float = 1.0, tau_neg: float = 1.05, beta: float = 0.0, entropy_bonus: float = 0.0
    ) -> None:
        if not (tau_pos > 0 and tau_neg > 0):
            raise ConfigurationError(
                f"model.objective: SAPO.tau_pos and SAPO.tau_neg must be above 0, got {tau_pos} and {tau_neg}"
            )
        super().__init__(beta, entropy_bonus)
        self.tau_pos = tau_pos
        self.tau_neg = tau_neg

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The gated ratio times the advantage."""
        ratio_BS = (inputs.logprobs_BS - inputs.old_logprobs_BS).exp()
        tau_BS = torch.where(inputs.advantages_BS > 0, ratio_BS.new_tensor(self.tau_pos), self.tau_neg)
        gate_BS = torch.sigmoid(tau_BS * (ratio_BS - 1)) * 4 / tau_BS
        return -gate_BS * inputs.advantages_BS, torch.zeros_like(inputs.mask_BS), ratio_BS
