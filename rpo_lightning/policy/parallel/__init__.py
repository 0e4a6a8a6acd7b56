"""The policy on several devices, a file for each kind of strategy."""
