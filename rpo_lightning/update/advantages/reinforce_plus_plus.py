"""REINFORCE++: advantages are normalised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.update.advantages.base import EPSILON, AdvantageEstimator, batch_moments, centred, total_rewards


class ReinforcePlusPlus(AdvantageEstimator):
    """REINFORCE++ (arXiv 2501.03262): ``(r_i - mean R) / std R``, both over the rewards R of the whole batch.

    A group whose members are all right gets positive advantages, one whose members are all wrong negative ones.

    Published code differs in two points. verl takes the moments over tokens, so that long responses count more; here
    every response counts once, as an advantage belongs to a response. The paper subtracts the KL penalty from the
    rewards of tokens; here it is in the loss (``model.objective.beta``).
    """

    learns_from_equal_rewards: ClassVar[bool] = True

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred and scaled by the batch."""
        rewards = total_rewards(groups)
        mean, deviation = batch_moments(rewards, ranks)
        return [(r - mean) / (deviation + EPSILON) for r in rewards]


class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """REINFORCE++ with a baseline (arXiv 2501.03262): ``c_i = r_i - mean r`` over the group, then ``c_i / std C``.

    C are the centred rewards of the whole batch. Their mean is zero. Moments are over responses, see
    ``ReinforcePlusPlus``.
    """

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred within each group, and scaled by the centred rewards of the batch."""
        of_groups = [centred(r) for r in total_rewards(groups)]
        _, deviation = batch_moments(of_groups, ranks)
        return [c / (deviation + EPSILON) for c in of_groups]
