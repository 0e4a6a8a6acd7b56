"""Unusual models are detected, by a trial or from their configuration, and are computed exactly."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from rpo_lightning.policy.prefix_sharing.compatibility import needs_full_logits, row_cost, sharing_obstacle
from rpo_lightning.rollout import GenerationRequest
from rpo_lightning.rollout.transformers import sequence_cache
from rpo_lightning.update.objectives import DAPO
from tests.conftest import make_group
from tests.policy.prefix_sharing.test_logprobs import assert_same
from tests.policy.prefix_sharing.test_shared_rows import gradient
from tests.rollout.test_transformers_engine import assert_log_probs_are_the_policys, generated

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 4,
}  # fmt: skip


def tiny(architecture, configuration, **changes):
    torch.manual_seed(0)
    settings = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    return architecture(configuration(**settings)).eval()


def test_caps_are_found_where_logits_are_too_small_to_show_them():
    capped = tiny(Gemma2ForCausalLM, Gemma2Config, initializer_range=0.02, final_logit_softcapping=30.0).bfloat16()
    assert needs_full_logits(capped)


def test_an_attention_that_cannot_be_replaced_is_told():
    falcon = tiny(FalconForCausalLM, FalconConfig, head_dim=None, alibi=False)
    assert "does not let its attention be replaced" in sharing_obstacle(falcon)


def test_a_trial_that_fails_says_what_failed():
    latent = tiny(DeepseekV3ForCausalLM, DeepseekV3Config, **LATENT)
    obstacle = sharing_obstacle(latent)
    assert "a trial failed" in obstacle
    assert "Q/K/V should have the same head size" in obstacle


def test_dropout_without_a_module_is_found():
    assert "dropout" in sharing_obstacle(tiny(OPTForCausalLM, OPTConfig, dropout=0.1, ffn_dim=48))


def test_keys_that_change_once_they_are_cached_keep_rows_apart():
    """Without gradient through the context its keys come from the cache."""
    model = tiny(DiffLlamaForCausalLM, DiffLlamaConfig)
    assert "does not keep the members of a shared row apart" in sharing_obstacle(model)


@pytest.mark.parametrize(
    ("architecture", "configuration", "changes"),
    [
        (JetMoeForCausalLM, JetMoeConfig, {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
        (DogeForCausalLM, DogeConfig, {}),
    ],
    ids=["keys repeated after caching", "a mask for each head"],
)
def test_what_cannot_share_prompts_decodes_with_copies_of_them(
    tokenizer, monkeypatch, caplog, architecture, configuration, changes
):
    monkeypatch.setattr(sequence_cache, "_BYTES_WORTH_SHARING", 0)
    policy = tiny(architecture, configuration, **changes)
    shares = row_cost(policy, shares=True, full_logits=needs_full_logits(policy)).shares
    asked = [GenerationRequest((3, 4, 5, 6, 7) * n, n=3, max_new_tokens=8) for n in (2, 3)]
    with caplog.at_level(logging.WARNING):
        assert_log_probs_are_the_policys(policy, asked, generated(policy, tokenizer, asked))
    assert ("each decodes with its own copy" in caplog.text) == shares


def test_rotary_embeddings_of_long_sequences_do_not_reach_short_rows():
    """The longest row of a pass decides the embedding of all its rows: lengths must not be mixed."""
    rotary = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 32}
    rotary |= {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    model = tiny(
        Phi3ForCausalLM, Phi3Config, max_position_embeddings=128, original_max_position_embeddings=32,
        rope_parameters=rotary, sliding_window=None,
    ).double()  # fmt: skip
    long, short = [(5, 6, 7, 8) * 8, (9, 4, 3, 8) * 8], [(5, 6, 7), (8, 9, 10), (7, 6, 5)]
    batch = [
        make_group([1.0, 0.0], long, prompt_ids=(11, 12, 13), uid="long"),
        make_group([1.0, 0.0, 0.5], short, prompt_ids=(21, 22, 23, 24, 25, 26, 27), uid="short"),
    ]
    alone, _ = gradient(model, DAPO(), batch=batch, share_prefixes=False, micro_batch_tokens=1)
    for share in (False, True):
        together, _ = gradient(model, DAPO(), batch=batch, share_prefixes=share, micro_batch_tokens=4096)
        assert_same(alone, together, 2e-6)  # transformers normalises in fp32
