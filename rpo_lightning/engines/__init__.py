"""Rollout engines."""

from rpo_lightning.engines.base import EngineContext, GenerationRequest, RolloutEngine, Sampling
from rpo_lightning.engines.transformers_engine import TransformersEngine
from rpo_lightning.engines.vllm_engine import VLLMEngine

__all__ = ["EngineContext", "GenerationRequest", "RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine"]
