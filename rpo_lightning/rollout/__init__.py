"""Rollouts: engines that sample suffixes, and groups made from their samples."""

from rpo_lightning.rollout.engine import EngineSetup, GenerationRequest, RolloutEngine, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine
from rpo_lightning.rollout.vllm.engine import VLLMEngine

__all__ = ["EngineSetup", "GenerationRequest", "RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine"]
