"""The embedded task and its tiny reasoner: what runs without a model hub."""
