"""``rpo-lightning cache``."""
