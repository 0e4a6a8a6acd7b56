"""Tells which sequences have ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from rpo_lightning.core.errors import ConfigurationError


class Stopping:
    """Ends a sequence at a token, or at the token with which a string is complete.

    Args:
        token_ids: Tokens that end a sequence.
        strings: Texts that end one. They are looked for in what is sampled, never in the context.
        tokenizer: The policy's tokenizer.

    Raises:
        ConfigurationError: No token of the vocabulary can complete one of the strings.
    """

    def __init__(self, token_ids: Collection[int], strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._token_ids = torch.tensor(sorted(token_ids))
        self._strings: StopStringCriteria | None = None
        if strings:
            try:
                self._strings = StopStringCriteria(tokenizer, list(strings))
            except ValueError as error:
                raise ConfigurationError(
                    f"model.stop={list(strings)}: the policy's tokenizer cannot write it: name texts of its vocabulary"
                ) from error

    @property
    def reach(self) -> int:
        """The most tokens that ``ended`` looks at."""
        return 1 if self._strings is None else int(self._strings.maximum_token_len)

    def to(self, device: torch.device) -> Stopping:
        """Compare on this device."""
        self._token_ids = self._token_ids.to(device)
        return self

    def ended(self, tokens_NT: Tensor) -> Tensor:
        """Whether each sequence ends with its last token.

        Args:
            tokens_NT: The last ``reach`` of the tokens that were sampled so far, or all of them, [N, T].

        Returns:
            Flags, [N].
        """
        ended_N = torch.isin(tokens_NT[:, -1], self._token_ids)
        return ended_N if self._strings is None else ended_N | self._strings(tokens_NT, None)
