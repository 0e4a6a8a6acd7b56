"""Tokenizers: loading, decoding, the tokens that end a response, and a fingerprint of the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.hashing import short_name
from rpo_lightning.policy.load import resolve_policy


def stop_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a response: the tokenizer's and the generation config's.

    Raises:
        EngineError: Neither names an end-of-sequence token.
    """
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise EngineError("neither the tokenizer nor generation_config.json names an end-of-sequence token")
    return ids


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy.

    Raises:
        ConfigurationError: There is none at that place.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_policy(name))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model.policy={name}: no tokenizer found there (neither a folder nor a reachable hub name)"
        ) from error


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary: token ids mean the same where it is equal."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return short_name(vocabulary)
