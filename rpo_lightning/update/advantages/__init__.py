"""Advantage estimators: how the rewards of groups become the advantages of their members."""

from rpo_lightning.update.advantages.base import AdvantageEstimator, largest_advantage
from rpo_lightning.update.advantages.gdpo import GDPO
from rpo_lightning.update.advantages.max_rl import MaxRL
from rpo_lightning.update.advantages.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from rpo_lightning.update.advantages.rloo import RLOO
from rpo_lightning.update.advantages.scaled import BatchScaled, GroupScaled, Unscaled, group_advantages

__all__ = [
    "GDPO",
    "RLOO",
    "AdvantageEstimator",
    "BatchScaled",
    "GroupScaled",
    "MaxRL",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "Unscaled",
    "group_advantages",
    "largest_advantage",
]
