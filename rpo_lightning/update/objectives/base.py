"""The base class of objectives. An objective is a loss for each token and a weight for each sequence.

The loss of an update is ``Σ_i w_i Σ_t ℓ_it`` over its sequences i and their loss tokens t. The weights ``w_i`` are
computed before the first backward pass from the lengths of all sequences, on all ranks. Therefore the gradient does not
depend on how sequences are split into micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.advantages import AdvantageEstimator, GroupScaled

Normalisation = Literal["token", "sequence"]


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch as objectives see it.

    Attributes:
        logprobs_BS: Log-probs of the loss tokens under the policy, with gradient.
        old_logprobs_BS: Their log-probs under the policy that sampled them, as the trainer computes them.
        engine_logprobs_BS: The same as the rollout engine computed them; the trainer's for tokens that it did not
            sample, and where the two cannot be compared.
        advantages_BS: Advantage of each token. Estimators give all tokens of a sequence the same.
        mask_BS: True at loss tokens.
        weights_B: Weight of every token of a sequence, from ``Objective.sequence_weights``.
        entropy_BS: Entropy of the policy before each token; with gradient if the objective has an entropy bonus.
        reference_logprobs_BS: Their log-probs under the reference policy; ``None`` without a KL penalty.
        importance_BS: Importance weights of the tokens (``rpo_lightning.update.importance``); ``None`` for 1.
    """

    logprobs_BS: Tensor
    old_logprobs_BS: Tensor
    engine_logprobs_BS: Tensor
    advantages_BS: Tensor
    mask_BS: Tensor
    weights_B: Tensor
    entropy_BS: Tensor
    reference_logprobs_BS: Tensor | None = None
    importance_BS: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Loss of a micro-batch, and figures for the logs.

    Attributes:
        loss: Scalar with gradient. The losses of an update's micro-batches add up to the update's.
        policy_loss: The loss without KL penalty and entropy bonus.
        kl_sum: Sum of the k3 estimates over loss tokens.
        clipped_sum: Number of loss tokens that ``Objective.token_losses`` reports as clipped.
        ratio_deviation_max: Largest |ratio - 1| of the loss tokens.
    """

    loss: Tensor
    policy_loss: Tensor
    kl_sum: Tensor
    clipped_sum: Tensor
    ratio_deviation_max: Tensor


class Objective(ABC):
    """Base class: normalisation, KL penalty and entropy bonus.

    Args:
        beta: Coefficient of the KL penalty to the reference policy (k3 estimator; Schulman 2020). With 0 there is no
            reference policy.
        entropy_bonus: Coefficient of the entropy of the next-token distribution at loss tokens. It is subtracted from
            the loss, with the weights of the policy loss. With 0 no gradient of the entropy is computed.

    Attributes:
        normalisation: What the loss is a mean of.
        default_advantages: The estimator of the paper.
        needs_default_advantages: Whether another estimator makes it another method.
        corrects_mismatch: Whether its ratio is to the engine's log-probs, so that no importance correction is due.
        ignores_zero_advantages: Whether ``token_losses`` and their gradient are 0 where the advantage is 0. The update
            then leaves such responses out of its passes. A class with ``token_losses`` of its own does not inherit it.
    """

    normalisation: ClassVar[Normalisation]
    default_advantages: ClassVar[type[AdvantageEstimator]] = GroupScaled
    needs_default_advantages: ClassVar[bool] = False
    corrects_mismatch: ClassVar[bool] = False
    ignores_zero_advantages: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"token_losses", "__call__"} and "ignores_zero_advantages" not in vars(cls):
            cls.ignores_zero_advantages = False  # the parent's says nothing of another loss

    def __init__(self, beta: float = 0.0, entropy_bonus: float = 0.0) -> None:
        require_at_least_zero(beta=beta, entropy_bonus=entropy_bonus)
        self.beta = beta
        self.entropy_bonus = entropy_bonus

    @property
    def learns_from_zero_advantages(self) -> bool:
        """Whether a response whose advantage is 0 has a gradient, that of KL penalty and entropy bonus included."""
        return not self.ignores_zero_advantages or self.beta > 0 or self.entropy_bonus > 0

    def sequence_weights(self, lengths: Tensor, total_tokens: float, total_sequences: float) -> Tensor:
        """Weight of every loss token of each sequence.

        Args:
            lengths: Number of loss tokens of each sequence, [B]; 0 for a sequence that is left out.
            total_tokens: Number of loss tokens of the update, on all ranks.
            total_sequences: Number of sequences of the update that have loss tokens, on all ranks.

        Returns:
            The weights, [B], float64.
        """
        if self.normalisation == "token":
            return torch.full_like(lengths, 1.0 / max(total_tokens, 1.0), dtype=torch.float64)
        return 1.0 / (lengths.clamp(min=1).double() * max(total_sequences, 1.0))

    @abstractmethod
    def token_losses(self, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Policy loss, whether clipping or a mask stops its gradient, and the ratio; each [B, S].

        The ratio is that to the old policy, or to what sampled where an objective compares with that (DPPO).
        """

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss of a micro-batch, KL penalty and entropy bonus included."""
        losses_BS, clipped_BS, ratio_BS = self.token_losses(inputs)
        weights_BS = inputs.weights_B[:, None] * inputs.mask_BS
        importance_BS = 1.0 if inputs.importance_BS is None else inputs.importance_BS
        policy_loss = (weights_BS * importance_BS * losses_BS).sum()
        loss, kl_sum = policy_loss, policy_loss.new_zeros(())
        if inputs.reference_logprobs_BS is not None:
            kl_BS = k3_divergence(inputs.logprobs_BS, inputs.reference_logprobs_BS)
            loss = loss + self.beta * (weights_BS * kl_BS).sum()
            kl_sum = (kl_BS.detach() * inputs.mask_BS).sum()
        if self.entropy_bonus:
            loss = loss - self.entropy_bonus * (weights_BS * inputs.entropy_BS).sum()
        deviation_BS = (ratio_BS.detach() - 1).abs() * inputs.mask_BS
        return LossOutput(
            loss=loss,
            policy_loss=policy_loss.detach(),
            kl_sum=kl_sum,
            clipped_sum=(clipped_BS & inputs.mask_BS).sum(),
            ratio_deviation_max=deviation_BS.max(),
        )


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy ‖ reference): ``exp(d) - d - 1`` with ``d = reference - policy``."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def require_at_least_zero(**settings: float) -> None:
    """Refuse settings of an objective that are negative or no number.

    Raises:
        ConfigurationError: One of them is.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise ConfigurationError(f"model.objective.{name} must be at least 0, got {value}")
