"""Rollouts on vLLM, which runs in the trainer's process."""
