"""Suffix budgets: how many tokens a suffix may have. The paper names none; its code allows the cut alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rpo_lightning.core.errors import ConfigurationError


class SuffixBudget(ABC):
    """Decides how many tokens a suffix may have."""

    @abstractmethod
    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """Budget of a suffix that follows a prefix, after which ``cut`` tokens of the cached response were dropped.

        The response limit is enforced around it. Full-path groups always get the whole limit.
        """


class FullBudget(SuffixBudget):
    """Up to the response limit, so that a response may grow past the cached one."""

    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """Whatever the prefix leaves of the limit."""
        return response_limit - prefix_length


class CutPlusSlackBudget(SuffixBudget):
    """What was cut plus ``slack``: the paper-like setting (the published code allows the cut alone, which may be 0).

    Args:
        slack: Extra tokens, at least 1, so that a cut of zero tokens still leaves one to generate.
    """

    def __init__(self, slack: int = 64) -> None:
        if slack < 1:
            raise ConfigurationError(
                f"cache.budget.slack={slack} allows a suffix budget of 0 tokens (a cut may drop 0): use at least 1"
            )
        self.slack = slack

    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """The cut and the slack."""
        return cut + self.slack
