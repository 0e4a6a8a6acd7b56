"""Tokenizers: loading, decoding, the tokens that end a response, a fingerprint of the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.hashing import short_name
from rpo_lightning.policy.load import resolve_policy


def stop_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response, as the tokenizer and the generation config name them.

    Raises:
        EngineError: Neither names an end-of-sequence token.
    """
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise EngineError(
            "neither the tokenizer nor generation_config.json of the policy names an end-of-sequence token: set "
            "eos_token_id in generation_config.json"
        )
    return ids


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy.

    Args:
        name: As in :func:`~rpo_lightning.policy.load.resolve_policy`.

    Raises:
        ConfigurationError: No tokenizer is found there.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_policy(name))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model.policy={name}: no tokenizer found; give a folder that holds one, or a hub name that can be reached"
        ) from error


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary. Where it is equal, token ids mean the same."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return short_name(vocabulary)
