"""What an engine is given is what a checkpoint of the policy holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, Qwen2Config

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.weights import checkpoint_weights

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
POLICIES = {
    "dense": Qwen2Config(**SIZES),
    "experts, one by one in a checkpoint": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "a router's bias, which is a buffer": Glm4MoeConfig(
        **SIZES, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1
    ),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_an_engine_is_given_every_weight_as_checkpoints_name_and_divide_them(tmp_path, kind):
    policy = AutoModelForCausalLM.from_config(POLICIES[kind])
    for _, buffer in policy.named_buffers():
        buffer.normal_()
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    given = dict(checkpoint_weights(policy))
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    "changed", [{"target_modules": ["q_proj", "lm_head"]}, {"options": {"modules_to_save": ["lm_head"]}}]
)
def test_an_adapter_does_not_part_an_output_head_from_its_embedding(changed):
    tied = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=True))
    with pytest.raises(ConfigurationError, match="ensure_weight_tying"):
        LoRA(rank=2, **changed).apply(tied)
    untied = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=False))
    names = dict(checkpoint_weights(untied)).keys()
    assert dict(checkpoint_weights(LoRA(rank=2, **changed).apply(untied))).keys() == names
