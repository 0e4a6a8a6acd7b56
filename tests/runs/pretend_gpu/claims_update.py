"""The whole loss, forward and backward, of six architectures under bf16 autocast, with the GPU's kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rpo_lightning.policy.prefix_sharing import gpu_check
from rpo_lightning.update.importance import TokenTruncated
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_group
from tests.runs.pretend_gpu.device import PretendTensor, moved

LAYERS = 2
SIZES = dict(
    vocab_size=512, hidden_size=384, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=64, query_pre_attn_scalar=64, sliding_window=1024)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
}
# Prompt, prefix and suffixes of three groups; the last has a context too short to share.
LENGTHS = ((21, 80, (5, 30, 1, 24)), (30, 40, (33, 2, 17, 30)), (1, 0, (8, 20, 7, 3)))


def model_of(kind):
    torch.manual_seed(0)
    return MODELS[kind]().train()


def groups():
    generator = torch.Generator(device="cpu").manual_seed(0)

    def ids(count):
        return tuple(torch.randint(3, 500, (count,), generator=generator, device="cpu").tolist())

    return [
        make_group([1.0, 0.0, 0.0, 1.0], [ids(n) for n in suffixes], ids(prompt), ids(prefix), uid=str(prompt))
        for prompt, prefix, suffixes in LENGTHS
    ]


def gradient_of(model, **settings):
    """The gradient of an update, flat and in fp32 on the CPU, and what the update logged."""
    model.zero_grad()
    chosen = UpdateSettings(**{"micro_batch_tokens": 8192, "importance_correction": TokenTruncated(), **settings})
    loss = PolicyLoss(model, None, DAPO(), chosen, 0, temperature=0.7, importance_correction=TokenTruncated())
    advantages = [torch.tensor([1.0, -1.0, -1.0, 1.0])] * len(LENGTHS)
    logged = loss.backward(groups(), advantages, lambda total, _: total.backward())
    parts = [
        p.grad.inner if isinstance(p.grad, PretendTensor) else p.grad for p in model.parameters() if p.requires_grad
    ]
    return torch.cat([part.clone().float().flatten() for part in parts if part is not None]), logged


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=list(MODELS))
def exact(request):
    """A model on the CPU and the gradient of its plain rows there, in fp32."""
    model = model_of(request.param)
    return model, gradient_of(copy.deepcopy(model), share_prefixes=False)[0]


def test_shared_rows_have_the_gradient_of_plain_rows_in_fp32(exact, pretend_gpu):
    model, expected = exact
    there = moved(copy.deepcopy(model))
    assert relative(gradient_of(there)[0], expected) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_shared_rows_round_no_more_than_plain_rows_under_autocast(exact, pretend_gpu, checkpointing):
    model, expected = exact
    there = moved(copy.deepcopy(model))
    if checkpointing:
        there.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = relative(gradient_of(there, share_prefixes=False)[0], expected)
        gradient_of(there)  # the kernels are tried here
        pretend_gpu.clear()
        shared, logged = gradient_of(there)
    assert relative(shared, expected) <= 1.5 * plain < 0.05
    # Two calls a layer: contexts and suffixes with themselves, suffixes with their contexts.
    passes = 2 if checkpointing else 1
    assert pretend_gpu.kernels["_flash_attention_forward.default"] == 2 * LAYERS * passes
    assert pretend_gpu.kernels["_flash_attention_backward.default"] == 2 * LAYERS
    assert gpu_check.kernels_agree.cache_info().currsize == 1
    assert logged["loss/ratio_deviation_max"] == 0
