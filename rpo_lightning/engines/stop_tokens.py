"""Which tokens end a response."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.errors import EngineError


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
