"""A policy that never ends a response by itself, so that every response has the length that is measured."""

from __future__ import annotations

from typing import Any

from common.random_policy import load


def load_endless(name: str) -> tuple[Any, Any]:
    """Load a policy and its tokenizer, with an end-of-sequence token that is hardly ever sampled."""
    policy, tokenizer = load(name)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(3)
    policy.generation_config.eos_token_id = None
    return policy, tokenizer
