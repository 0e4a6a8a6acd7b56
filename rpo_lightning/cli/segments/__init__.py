"""``rpo-lightning segments``: measures how much each part of a response decides."""
