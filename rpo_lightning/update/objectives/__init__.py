"""Objectives: how log-probs and advantages become a loss."""

from rpo_lightning.update.objectives.base import LossInputs, LossOutput, Objective
from rpo_lightning.update.objectives.cispo import CISPO
from rpo_lightning.update.objectives.grpo import DAPO, GRPO, DrGRPO
from rpo_lightning.update.objectives.gspo import GSPO

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "DrGRPO", "LossInputs", "LossOutput", "Objective"]
