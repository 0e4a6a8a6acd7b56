"""What objectives with a clipped ratio share."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_lightning.update.objectives.base import Objective, require_at_least_zero


class ClippedObjective(Objective):
    """An objective with a clipping range.

    Args:
        clip_low: The ratio is clipped at ``1 - clip_low``.
        clip_high: The ratio is clipped at ``1 + clip_high``.
        beta: See ``Objective``.
        entropy_bonus: See ``Objective``.
    """

    def __init__(self, clip_low: float, clip_high: float, beta: float = 0.0, entropy_bonus: float = 0.0) -> None:
        require_at_least_zero(clip_low=clip_low, clip_high=clip_high)
        super().__init__(beta, entropy_bonus)
        self.clip_low = clip_low
        self.clip_high = clip_high


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO's loss ``-min(ratio · A, clip(ratio) · A)``, and where clipping stops its gradient."""
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate, clipped_surrogate_ = ratio * advantages, clipped_ratio * advantages
    return -torch.minimum(surrogate, clipped_surrogate_), clipped_surrogate_ < surrogate
