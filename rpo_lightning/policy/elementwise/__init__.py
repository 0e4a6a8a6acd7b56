"""Fused kernels for the elementwise work of a policy's layers: norms, gated MLPs and rotary embeddings."""
