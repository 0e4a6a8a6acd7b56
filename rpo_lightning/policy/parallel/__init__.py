"""The policy on several devices: one file for each kind of strategy."""
