"""Reinforcement fine-tuning with partial reasoning optimization (RPO) on PyTorch Lightning."""

from rpo_lightning.callbacks import ExperienceCacheCallback, WeightSyncCallback
from rpo_lightning.data import RPODataModule
from rpo_lightning.engines import RolloutEngine, Sampling, TransformersEngine, VLLMEngine
from rpo_lightning.errors import RPOError
from rpo_lightning.module import RPOModule

__all__ = [
    "ExperienceCacheCallback",
    "RPODataModule",
    "RPOError",
    "RPOModule",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "WeightSyncCallback",
]
