"""Shared rows are tried exactly: in 16 bits as in 32, with rounding that differs from model to model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.prefix_sharing.compatibility import needs_full_logits, row_cost, sharing_obstacle
from rpo_lightning.policy.prefix_sharing.trial import logprobs_of, trying
from rpo_lightning.rollout.transformers.attention import decoding_attention
from rpo_lightning.rollout.transformers.sequence_cache import contexts_can_be_shared

SMOLLM2 = Path(__file__).parents[3] / "models" / "smollm2-135m-instruct"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rough_model(dtype=torch.bfloat16, layers=4):
    """A model whose log-probs in 16 bits are far from those in 32, as those of pretrained models are on odd tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8)
    return model.to(dtype).eval()


def shares(model):
    """Whether members share rows in the update, and sequences a context in decoding."""
    in_update = row_cost(model, shares=True, full_logits=needs_full_logits(model)).shares
    with torch.no_grad(), decoding_attention(model) as may_share:
        return in_update, may_share and contexts_can_be_shared(model)


def test_the_rough_model_is_rough():
    with trying(exact := rough_model(torch.float32)), trying(coarse := rough_model()):
        apart = logprobs_of(exact, (3, 5, 4), ((6, 7), (8, 9)), False, False) - logprobs_of(
            coarse, (3, 5, 4), ((6, 7), (8, 9)), False, False
        )
    assert apart.abs().max() > 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [rough_model, lambda dtype: load_policy("embedded:arithmetic-reasoner").to(dtype)])
def test_models_share_rows_whatever_their_precision(make, dtype, caplog):
    assert shares(make(dtype)) == (True, True)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_model_shares_rows(dtype):
    assert shares(LoRA(rank=2).apply(rough_model(dtype))) == (True, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_layer_that_mixes_neighbouring_tokens_is_found_in_every_precision(dtype, share):
    model = rough_model(dtype)
    norm = model.model.layers[1].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) + share * torch.roll(forward(x), 1, 1)
    assert "another member's tokens change its log-probs" in sharing_obstacle(model)


class OwnPositions(nn.Module):
    """Counts positions from the start of the row, whatever it is given."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids):
        return self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_counts_positions_itself_is_found_in_every_precision(dtype):
    model = rough_model(dtype)
    model.model.rotary_emb = OwnPositions(model.model.rotary_emb)
    obstacle = sharing_obstacle(model)
    assert "positions that it is given" in obstacle or "log-probs of a trial differ" in obstacle


def test_a_trial_leaves_the_model_as_it_was():
    model = rough_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert shares(model) == (True, True)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(not SMOLLM2.exists(), reason="no SmolLM2 (make smollm2)")
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_smollm2_shares_rows_in_16_bits(dtype, adapted):
    model = load_policy(str(SMOLLM2)).to(dtype)
    assert shares(LoRA(rank=2).apply(model) if adapted else model) == (True, True)


@pytest.mark.skipif(not SMOLLM2.exists(), reason="no SmolLM2 (make smollm2)")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_smollm2_shares_rows_with_quantised_weights(quantization):
    lora = LoRA(rank=2, quantization=quantization)
    assert shares(lora.apply(load_policy(str(SMOLLM2), **lora.loading_options()))) == (True, True)
