"""Prompts and limits that do not fit a policy are refused in one line, before anything is computed, by any engine."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.limits import max_positions
from rpo_lightning.rollout import TransformersEngine, VLLMEngine
from tests.conftest import make_data, make_module, make_trainer


def gpt2(positions: int, vocabulary: int = 48):
    config = GPT2Config(vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=1, n_head=2, eos_token_id=2)
    return GPT2LMHeadModel(config)


def llama(positions: int, vocabulary: int = 48):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("engine", [TransformersEngine, VLLMEngine])
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_response_limit_beyond_the_positions_is_refused(tmp_path, tokenizer, make, engine, stage):
    module = make_module(policy=make(100), tokenizer=tokenizer, engine=engine(), max_response_tokens=64)
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    with pytest.raises(ConfigurationError, match=r"the policy's 100 positions: lower model\.max_response_tokens"):
        getattr(trainer, stage)(module, datamodule=make_data())


def test_a_limit_that_fits_exactly_is_taken(tmp_path, tokenizer):
    data = make_data()
    longest = 76  # the embedded task's questions
    module = make_module(policy=gpt2(longest + 8), tokenizer=tokenizer, max_response_tokens=8)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert data.longest_prompt <= longest


def test_a_prompt_with_tokens_beyond_the_embedding_is_refused(tmp_path, tokenizer):
    module = make_module(policy=llama(512, vocabulary=10), tokenizer=tokenizer, max_response_tokens=8)
    with pytest.raises(ConfigurationError, match=r"the policy's embedding has 10 rows"):
        make_trainer(tmp_path).fit(module, datamodule=make_data())


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "linear", "factor": 2.0}, 2000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 500, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 1000),
    ],
)  # fmt: skip
def test_scaled_rotary_embeddings_reach_further(scaling, expected):
    more = {} if scaling is None else {"rope_scaling": scaling}
    assert max_positions(Qwen2Config(max_position_embeddings=1000, **more)) == expected
