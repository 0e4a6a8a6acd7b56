"""Rollouts on plain transformers, which decode with the policy itself."""
