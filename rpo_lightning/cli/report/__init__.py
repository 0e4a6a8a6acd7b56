"""``rpo-lightning report``."""
