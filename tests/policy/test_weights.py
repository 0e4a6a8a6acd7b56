"""An engine gets exactly the weights that a checkpoint of the policy holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, Qwen2Config

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.policy.export import export_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.weights import checkpoint_weights, require_plain_names
from tests.conftest import make_data, make_module, make_trainer

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


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_single_trained_tokens_are_merged_into_the_embedding(tmp_path, tied):
    policy = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    names = dict(checkpoint_weights(policy)).keys()
    adapted = LoRA(rank=2, options={"trainable_token_indices": [5, 6]}).apply(policy)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    given = {name: weight.clone() for name, weight in checkpoint_weights(adapted)}
    assert given.keys() == names
    require_plain_names(adapted)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    ids = torch.arange(8)[None]
    logits = adapted.eval()(input_ids=ids).logits
    export_policy(adapted, WordTokenizer(), tmp_path / "policy", True, Ranks())
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
    whole = adapted.merge_and_unload().state_dict()
    for name, weight in given.items():
        torch.testing.assert_close(weight, whole[name], atol=1e-6, rtol=0)


class WordTokenizer:
    """Saves nothing."""

    def save_pretrained(self, folder):
        pass


class Wrapped(nn.Module):
    """A layer inside another, as an unknown adapter makes it."""

    def __init__(self, layer):
        super().__init__()
        self.inside = layer
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.inside(x) * self.scale


def test_names_that_no_checkpoint_has_are_an_error_before_training_and_before_export(tmp_path, tokenizer):
    policy = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))
    policy.model.layers[0].mlp.up_proj = Wrapped(policy.model.layers[0].mlp.up_proj)
    told = r"missing model\.layers\.0\.mlp\.up_proj\.weight; unknown model\.layers\.0\.mlp\.up_proj\.inside\.weight"
    with pytest.raises(ConfigurationError, match=told):
        require_plain_names(policy)
    with pytest.raises(ConfigurationError, match=told):
        make_trainer(tmp_path).fit(make_module(policy=policy, tokenizer=tokenizer), datamodule=make_data())
    with pytest.raises(ConfigurationError, match=told):
        export_policy(policy, WordTokenizer(), tmp_path / "policy", True, Ranks())
    assert not (tmp_path / "policy").exists()
