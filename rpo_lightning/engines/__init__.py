"""Rollout engines."""

from rpo_lightning.engines.base import GenerationRequest, RolloutEngine, Sampling
from rpo_lightning.engines.transformers_engine import TransformersEngine

__all__ = ["GenerationRequest", "RolloutEngine", "Sampling", "TransformersEngine"]
