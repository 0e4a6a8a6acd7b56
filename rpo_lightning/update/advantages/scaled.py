"""Rewards minus their group's mean, and divided by what the variant says (eq. 7 of the RPO paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.update.advantages.base import EPSILON, AdvantageEstimator, batch_moments, centred, total_rewards


def group_advantages(rewards: Sequence[Sequence[float]]) -> list[Tensor]:
    """``(r_i - mean r) / (std r + 1e-6)`` within each group, [G], float64. The deviation is a sample's (n - 1)."""
    groups = [torch.tensor(r, dtype=torch.float64) for r in rewards]
    return [centred(r) / (r.std() + EPSILON) for r in groups]


class GroupScaled(AdvantageEstimator):
    """GRPO's advantages (arXiv 2402.03300): ``(r_i - mean r) / std r``, both over the group."""

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred and scaled within each group."""
        return group_advantages([group.rewards for group in groups])


class BatchScaled(AdvantageEstimator):
    """``(r_i - mean r) / std R``: the mean over the group, the deviation over the rewards R of the whole batch.

    ``ReinforcePlusPlusBaseline`` divides by the deviation of centred rewards
    instead, which is smaller where questions differ in difficulty.
    """

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred within each group, and scaled by the batch."""
        rewards = total_rewards(groups)
        _, deviation = batch_moments(rewards, ranks)
        return [centred(r) / (deviation + EPSILON) for r in rewards]


class Unscaled(AdvantageEstimator):
    """Dr. GRPO's advantages (arXiv 2503.20783): ``r_i - mean r``."""

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred within each group."""
        return [centred(r) for r in total_rewards(groups)]
