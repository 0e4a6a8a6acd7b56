"""Checks that prompts and responses fit a policy: its number of positions and the size of its embedding."""

from __future__ import annotations

from typing import Any

from rpo_lightning.core.errors import ConfigurationError


def require_positions(config: Any, longest_prompt: int, max_response_tokens: int) -> None:
    """Check that the longest sequence of a run fits into the policy's positions.

    Beyond the limit, rotary embeddings silently compute positions that were never trained. Learned embeddings raise an
    ``IndexError`` in the middle of a run.

    Args:
        config: The configuration of the policy's text model.
        longest_prompt: Length of the longest prompt in tokens.
        max_response_tokens: Longest response in tokens.

    Raises:
        ConfigurationError: The longest sequence does not fit.
    """
    positions = max_positions(config)
    if positions is not None and longest_prompt + max_response_tokens > positions:
        room = positions - longest_prompt
        remedy = (
            f"lower model.max_response_tokens to at most {room}"
            if room > 0
            else f"lower data.max_prompt_tokens to less than {positions}"
        )
        raise ConfigurationError(
            f"model.max_response_tokens={max_response_tokens} after a prompt of {longest_prompt} tokens needs more "
            f"than the policy's {positions} positions: {remedy}"
        )


def max_positions(config: Any) -> int | None:
    """Longest sequence of a text model in tokens, with scaled rotary embeddings; ``None`` if it has no limit."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    positions = [value for value in found if isinstance(value, int) and value > 0]
    if not positions:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_kinds = [s for s in scaling.values() if isinstance(s, dict)] or [scaling]
    scaled = [
        int(s["factor"] * (s.get("original_max_position_embeddings") or positions[0]))
        for s in of_kinds
        if isinstance(s.get("factor"), int | float)
        and s.get("rope_type", s.get("type")) in ("linear", "dynamic", "yarn")
    ]
    return max(positions[0], *scaled) if scaled else positions[0]


def require_known_tokens(policy: Any, highest_id: int) -> None:
    """Check that the policy's embedding has a row for every token of the prompts.

    Args:
        policy: The policy.
        highest_id: Highest token id of the prompts.

    Raises:
        ConfigurationError: A token has no row.
    """
    embedding = policy.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and highest_id >= size:
        raise ConfigurationError(
            f"a prompt has token id {highest_id}, but the policy's embedding has {size} rows: use this "
            "policy's own tokenizer, or call resize_token_embeddings after adding tokens to it"
        )


def head_size(config: Any) -> int:
    """Size of an attention head, from a configuration that may not name it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
