"""Scripts that make policies without a model hub: the embedded reasoner, and SmolLM2."""
