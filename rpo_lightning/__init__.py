"""Reinforcement fine-tuning with partial reasoning optimization (RPO) on PyTorch Lightning."""

from rpo_lightning.callbacks import ExperienceCacheCallback, WeightSyncCallback
from rpo_lightning.core.errors import RPOError
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule
from rpo_lightning.rollout import RolloutEngine, Sampling, TransformersEngine, VLLMEngine

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
