"""DPPO: tokens are masked by the divergence of the policies, not by the ratio."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.objectives.base import LossInputs, Normalisation, Objective

# Smallest probability of all other tokens; log-probs in fp32 tell no smaller ones from 0.
_SMALLEST = 1e-8


class DPPO(Objective):
    """Divergence Proximal Policy Optimization with the binary TV divergence (arXiv 2602.04879, eqs. 11 to 13).

    With the policy π, the policy μ that sampled the tokens, and the ratio ``r = π/μ`` of a token, its loss is
    ``-M · r · A``. The mask M is 0 where the update would move the token further away than the threshold allows:

        M = 0  if A > 0, r > 1 and D > threshold, or A < 0, r < 1 and D > threshold;  else M = 1
        D = |π - μ|    (total variation of the distributions {this token, any other token})

    Clipping allows rare tokens too little and common ones too much; the divergence treats them alike. The ratio of a
    token that is not masked has no bound, since truncating it harms rare tokens (section 5.4).

    μ is the rollout engine's policy, not the trainer's copy of it: the paper found that the trust region must be around
    what sampled. So the ratio corrects for the engine, there is no importance correction besides, and tokens may be
    masked in the first update of a rollout. Tokens that the engine did not sample are compared with the trainer's old
    policy.

    The paper's other estimate of D, over the top k tokens, would need the engine's distribution at each token, and is
    left out. The sum over tokens is divided by the number of loss tokens of the update, a factor that all of them
    share.

    Args:
        threshold: Largest divergence.
        beta: See ``Objective``.
        entropy_bonus: See ``Objective``.
    """

    normalisation: ClassVar[Normalisation] = "token"
    ignores_zero_advantages: ClassVar[bool] = True
    corrects_mismatch: ClassVar[bool] = True

    def __init__(self, threshold: float = 0.15, beta: float = 0.0, entropy_bonus: float = 0.0) -> None:
        if not threshold > 0:
            raise ConfigurationError(
                f"model.objective: {type(self).__name__}.threshold must be above 0 (.inf: no mask), got {threshold}"
            )
        super().__init__(beta, entropy_bonus)
        self.threshold = threshold

    def divergence(self, logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
        """Divergence of the policy from the one that sampled, estimated from the log-probs of the sampled tokens."""
        return (logprobs.exp() - sampling_logprobs.exp()).abs()

    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The ratio times the advantage, and 0 where the token is masked."""
        ratio_BS = (inputs.logprobs_BS - inputs.engine_logprobs_BS).exp()
        is_far_BS = self.divergence(inputs.logprobs_BS.detach(), inputs.engine_logprobs_BS) > self.threshold
        moves_away_BS = (ratio_BS.detach() - 1) * inputs.advantages_BS > 0
        masked_BS = is_far_BS & moves_away_BS
        losses_BS = -ratio_BS * inputs.advantages_BS
        return torch.where(masked_BS, 0.0, losses_BS), masked_BS, ratio_BS


class DPPOKL(DPPO):
    """DPPO with the binary KL divergence (arXiv 2602.04879, eq. 14).

    As ``DPPO``, with ``D = μ log(μ/π) + (1 - μ) log((1 - μ)/(1 - π))``.

    Args:
        threshold: Largest divergence, in nats.
        beta: See ``Objective``.
        entropy_bonus: See ``Objective``.
    """

    def __init__(self, threshold: float = 0.05, beta: float = 0.0, entropy_bonus: float = 0.0) -> None:
        super().__init__(threshold, beta, entropy_bonus)

    def divergence(self, logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
        """KL divergence from the policy that sampled to the policy."""
        others, sampling_others = ((-x.expm1()).clamp(min=_SMALLEST) for x in (logprobs, sampling_logprobs))
        of_token = sampling_logprobs.exp() * (sampling_logprobs - logprobs)
        return of_token + sampling_others * (sampling_others / others).log()
