"""Operations and bytes that a model's update and decoding cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelWork:
    """What a token costs.

    Attributes:
        matrices: Weights of the layers' matrix products.
        head: Weights of the output head.
        pair: Operations of a query–key pair, forward.
        cache: Numbers in the keys and values of a token.
    """

    matrices: int
    head: int
    pair: int
    cache: int

    @classmethod
    def of(cls, policy: Any) -> ModelWork:
        """Read it off a decoder of transformers'."""
        config = policy.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            matrices=sum(p.numel() for p in policy.model.layers.parameters() if p.dim() > 1),
            head=config.vocab_size * config.hidden_size,
            pair=4 * config.num_hidden_layers * config.num_attention_heads * size,
            cache=2 * config.num_hidden_layers * config.num_key_value_heads * size,
        )

    def prefill(self, context: int) -> float:
        """Operations of a forward pass over a prompt and its kept prefix, of which nothing is scored."""
        return 2 * self.matrices * context + self.pair * context**2 / 2

    def update(self, context: int, suffix: int, group: int, share: bool) -> float:
        """Operations of a group's forward and backward pass, nothing recomputed; the head scores suffixes only.

        Args:
            context: Tokens of prompt and kept prefix.
            suffix: Tokens of each suffix.
            group: Suffixes.
            share: Whether the context is computed once.
        """
        contexts = 1 if share else group
        tokens = contexts * context + group * suffix
        pairs = contexts * context**2 / 2 + group * (suffix * context + suffix**2 / 2)
        # Flash attention computes the scores again: two and a half times the forward pass's operations backward.
        return 6 * self.matrices * tokens + 6 * self.head * group * suffix + 3.5 * self.pair * pairs

    def decoding(self, context: int, suffix: int, sequences: int, number_bytes: int = 2) -> float:
        """Bytes that are read while all sequences decode together: weights and the cache so far, at every step."""
        numbers = self.matrices + self.head + sequences * (context + suffix / 2) * self.cache
        return suffix * numbers * number_bytes
