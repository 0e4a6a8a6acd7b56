"""The base class of advantage estimators, and what they share.

Advantages are computed once for all groups that a rollout trains on, before these are split into updates. Statistics
over the batch are those of all responses on all ranks, each counted once, whatever its length: one response has one
advantage, and neither the loss scope nor the lengths change it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group

# Added to standard deviations, so that equal values get zeros.
EPSILON = 1e-6


class AdvantageEstimator(ABC):
    """Turns the rewards of groups into advantages.

    Attributes:
        learns_from_equal_rewards: Whether members of a group whose total rewards are equal may get advantages other
            than zero.
    """

    learns_from_equal_rewards: ClassVar[bool] = False

    @abstractmethod
    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Advantages of each group's members; a collective.

        Args:
            groups: This rank's groups. They may differ in size, but each has at least two members.
            reward_weights: Weight of each term of the reward in the total.
            ranks: The ranks that share the batch.

        Returns:
            The advantages of each group's members, [G], float64.
        """

    def caveat(self, reward_weights: Mapping[str, float]) -> str | None:
        """What a user of these rewards should know, in one line; ``None`` for nothing."""
        return None


def total_rewards(groups: Sequence[Group]) -> list[Tensor]:
    """The total rewards of each group's members, [G], float64."""
    return [torch.tensor(group.rewards, dtype=torch.float64) for group in groups]


def centred(rewards: Tensor) -> Tensor:
    """Rewards minus their mean, [G]; exactly 0 if all are equal, though their mean may be rounded to another number."""
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return rewards - rewards.mean()


def batch_moments(values: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of the values of all ranks; a collective."""
    here = torch.cat([*values, torch.zeros(0, dtype=torch.float64)])
    count, total = ranks.sum(torch.stack([torch.tensor(len(here), dtype=torch.float64), here.sum()]))
    mean = total / count
    squares = ranks.sum((here - mean).square().sum())
    return mean, (squares / (count - 1)).sqrt()


def largest_advantage(advantages: Sequence[Tensor], ranks: Ranks) -> float:
    """The largest absolute advantage on any rank; a collective."""
    return float(ranks.max(torch.cat([*advantages, torch.zeros(1, dtype=torch.float64)]).abs().max()))
