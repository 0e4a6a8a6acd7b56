"""Rollout engines."""

from rpo_lightning.rollout.engine import EngineContext, GenerationRequest, RolloutEngine, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine
from rpo_lightning.rollout.vllm.engine import VLLMEngine

__all__ = ["EngineContext", "GenerationRequest", "RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine"]
