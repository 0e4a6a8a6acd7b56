"""Objectives: the loss of a policy from log-probs and advantages."""

from rpo_lightning.update.objectives.base import LossInputs, LossOutput, Objective
from rpo_lightning.update.objectives.cispo import CISPO
from rpo_lightning.update.objectives.grpo import DAPO, GRPO, DrGRPO
from rpo_lightning.update.objectives.gspo import GSPO

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "DrGRPO", "LossInputs", "LossOutput", "Objective"]
