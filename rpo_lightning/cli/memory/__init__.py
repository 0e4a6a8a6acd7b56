"""How much memory a config needs on each device, estimated before anything is loaded."""

from rpo_lightning.cli.memory.estimate import Estimate, estimate
from rpo_lightning.cli.memory.model import ModelShape, model_shape
from rpo_lightning.cli.memory.plan import EnginePlan, Part, Plan, Precision

__all__ = ["EnginePlan", "Estimate", "ModelShape", "Part", "Plan", "Precision", "estimate", "model_shape"]
