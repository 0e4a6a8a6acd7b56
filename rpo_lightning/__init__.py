"""Reinforcement fine-tuning with partial reasoning optimization (RPO) on PyTorch Lightning.

Names are imported when they are first used: ``rpo-lightning --help`` needs neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "rpo_lightning.callbacks": ("ExperienceCacheCallback", "WeightSyncCallback"),
    "rpo_lightning.core.errors": ("RPOError",),
    "rpo_lightning.data.datamodule": ("RPODataModule",),
    "rpo_lightning.module": ("RPOModule",),
    "rpo_lightning.rollout": ("RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'rpo_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
