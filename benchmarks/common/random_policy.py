"""Policies with random weights, by name: the size of a model that cannot be had here, and its speed."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import load_tokenizer

PREFIX = "random:"
# As DeepSeek-R1-Distill-Qwen-1.5B and -7B but for tied embeddings, and one for trying a script.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768,
    },
    "qwen2-7b": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 32_768,
    },
    "qwen2-tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 41_000, "max_position_embeddings": 8_192,
    },
}  # fmt: skip


def make(size: str, device: str) -> Any:
    """A policy of one of the sizes, with random weights; on ``meta`` without weights."""
    config = Qwen2Config(**SIZES[size], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype()).train()


def load(name: str) -> tuple[Any, Any]:
    """A policy in torch's default dtype and its tokenizer: ``random:`` and a size, or what users name.

    Random ones are made on the GPU where there is one.
    """
    if not name.startswith(PREFIX):
        return load_policy(name), load_tokenizer(name)
    policy = make(name.removeprefix(PREFIX), "cuda" if torch.cuda.is_available() else "cpu")
    return policy, _words(policy.config.vocab_size)


def _words(size: int) -> PreTrainedTokenizerFast:
    """Word ``<17>`` is token 17, so that text and ids are each other's image."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<0>", pad_token="<0>", bos_token="<1>", eos_token="<2>"
    )
    ids = [100, 200, 1000, size - 1]
    assert words(words.decode(ids))["input_ids"] == ids
    return words
