"""``rpo-lightning memory``: estimates how much memory a config needs on each device. Loads no weights."""

from rpo_lightning.cli.memory.estimate import Estimate, estimate
from rpo_lightning.cli.memory.model import ModelShape, model_shape
from rpo_lightning.cli.memory.plan import EnginePlan, Part, Plan, Precision

__all__ = ["EnginePlan", "Estimate", "ModelShape", "Part", "Plan", "Precision", "estimate", "model_shape"]
