"""The update of the policy from scored groups: advantages, objectives, loss, and checks of a run's health."""
