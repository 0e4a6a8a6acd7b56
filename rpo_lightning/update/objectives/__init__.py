"""Objectives: the loss of a policy from log-probs and advantages."""

from rpo_lightning.update.objectives.base import LossInputs, LossOutput, Objective
from rpo_lightning.update.objectives.cispo import CISPO
from rpo_lightning.update.objectives.dppo import DPPO, DPPOKL
from rpo_lightning.update.objectives.grpo import DAPO, GRPO, DrGRPO
from rpo_lightning.update.objectives.gspo import GSPO
from rpo_lightning.update.objectives.gspo_token import GSPOToken
from rpo_lightning.update.objectives.sapo import SAPO

__all__ = [
    "CISPO",
    "DAPO",
    "DPPO",
    "DPPOKL",
    "GRPO",
    "GSPO",
    "SAPO",
    "DrGRPO",
    "GSPOToken",
    "LossInputs",
    "LossOutput",
    "Objective",
]
