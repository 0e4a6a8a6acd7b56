"""Shared rows: the context (prompt and prefix) is computed once for all members of a group."""
