"""Rollouts that decode with the policy itself."""
