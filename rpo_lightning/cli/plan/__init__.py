"""``rpo-lightning plan``: estimates from a sample what a run would sample, learn from and cost, before it starts."""
