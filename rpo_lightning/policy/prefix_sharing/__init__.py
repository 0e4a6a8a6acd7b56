"""One row for a group: the prompt and prefix are computed once for all its members."""
