"""From scored groups to a gradient."""
