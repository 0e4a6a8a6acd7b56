"""Rollouts on vLLM, in the trainer's process."""
