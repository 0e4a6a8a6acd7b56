"""Suffix budgets: how many tokens a suffix may have.

The paper specifies no budget. Its published code gives a suffix as many tokens as were cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from rpo_lightning.core.errors import ConfigurationError


class SuffixBudget(ABC):
    """Decides how many tokens a suffix may have."""

    @abstractmethod
    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """Budget of a suffix, in tokens.

        The caller caps the result at what the prefix leaves of the response limit. Full-path groups get the whole
        limit and do not ask.

        Args:
            prefix_length: Tokens of the prefix.
            cut: Tokens dropped from the end of the cached response.
            response_limit: Limit of a whole response in tokens.
        """


class FullBudget(SuffixBudget):
    """Everything up to the response limit. A response may become longer than the cached one."""

    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """The response limit minus the prefix."""
        return response_limit - prefix_length


class CutPlusSlackBudget(SuffixBudget):
    """As many tokens as were cut, plus ``slack``: the setting closest to the paper's code, which has no slack.

    Args:
        slack: Extra tokens, at least 1: a cut may drop 0 tokens.
    """

    def __init__(self, slack: int = 64) -> None:
        if slack < 1:
            raise ConfigurationError(
                f"cache.budget.slack={slack} allows a suffix budget of 0 tokens (a cut may drop 0): use at least 1"
            )
        self.slack = slack

    def tokens(self, prefix_length: int, cut: int, response_limit: int) -> int:
        """The cut plus the slack."""
        return cut + self.slack
