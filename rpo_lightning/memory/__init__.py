"""How much memory a config needs on each device, estimated before anything is loaded."""

from rpo_lightning.memory.estimate import Estimate, Part, estimate
from rpo_lightning.memory.plan import EnginePlan, Plan, Precision
from rpo_lightning.memory.shape import ModelShape, model_shape

__all__ = ["EnginePlan", "Estimate", "ModelShape", "Part", "Plan", "Precision", "estimate", "model_shape"]
