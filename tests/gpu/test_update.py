"""The update and the transformers engine on a GPU in bf16. The second part of ``make test-gpu``; about a minute."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rpo_lightning.policy.elementwise.choice import use_elementwise_kernels
from rpo_lightning.policy.load import load_policy
from rpo_lightning.update.objectives import DAPO
from tests.conftest import REASONER, make_group
from tests.policy.prefix_sharing.test_logprobs import reference_logprobs
from tests.policy.prefix_sharing.test_shared_rows import gradient
from tests.rollout.test_transformers_engine import generated, requests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def grouped_heads():
    """A small Qwen2 with six query heads on two of keys, of the usual size."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=384, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).train()


def long_groups():
    """Uneven groups after contexts of 301, 70 and 1 tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return tuple(torch.randint(3, 40, (count,), generator=generator).tolist())

    return [
        make_group([1.0, 0.0, 0.0, 1.0], [ids(n) for n in suffixes], ids(prompt), ids(prefix), uid=str(prompt))
        for prompt, prefix, suffixes in ((21, 280, (5, 90, 1, 64)), (30, 40, (33, 2, 17, 130)), (1, 0, (8, 120, 7, 3)))
    ]


def flat(gradients):
    return torch.cat([g.float().flatten() for g in gradients.values()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["suffix", "response"])
@pytest.mark.parametrize("make", [grouped_heads, lambda: load_policy(REASONER)], ids=["grouped heads", "reasoner"])
def test_packed_rows_are_as_exact_as_plain_rows_in_bf16(make, scope, checkpointing, kernel_calls):
    policy, batch = make().cuda(), long_groups()
    exact, _ = gradient(policy, DAPO(), batch=batch, loss_scope=scope, share_prefixes=False)
    masked, _ = gradient(policy, DAPO(), batch=batch, loss_scope=scope)
    assert (flat(masked) - flat(exact)).norm() < 1e-4 * flat(exact).norm()  # fp32: SDPA with a mask
    assert not kernel_calls
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain, _ = gradient(policy, DAPO(), batch=batch, loss_scope=scope, share_prefixes=False)
        packed, metrics = gradient(policy, DAPO(), batch=batch, loss_scope=scope)
        split, _ = gradient(policy, DAPO(), batch=batch, loss_scope=scope, micro_batch_tokens=420)
    assert metrics["tokens"] == 301 + 160 + 70 + 182 + 1 + 138  # every context once
    assert kernel_calls
    rounding = (flat(plain) - flat(exact)).norm()
    assert rounding > 0
    for gradients in (packed, split):
        assert (flat(gradients) - flat(exact)).norm() < 1.5 * rounding


def test_packed_rows_continue_frozen_contexts_in_bf16(kernel_calls):
    policy, batch = grouped_heads().cuda(), long_groups()
    exact, _ = gradient(policy, DAPO(), batch=batch, prefix_gradient=False)  # fp32: SDPA with a mask
    with torch.autocast("cuda", dtype=torch.bfloat16):
        packed, _ = gradient(policy, DAPO(), batch=batch, prefix_gradient=False)
        plain, _ = gradient(policy, DAPO(), batch=batch, share_prefixes=False)
    assert kernel_calls
    whole, _ = gradient(policy, DAPO(), batch=batch, share_prefixes=False)
    rounding = (flat(plain) - flat(whole)).norm() / flat(whole).norm()
    assert (flat(packed) - flat(exact)).norm() < 2 * rounding * flat(exact).norm()
    assert (flat(exact) - flat(whole)).norm() > 10 * rounding * flat(whole).norm()  # it is another gradient


@pytest.mark.parametrize("implementation", ["FA3", "FA4"], indirect=True)
def test_other_implementations_of_flash_attention_are_as_exact_in_bf16(implementation, kernel_calls):
    policy, batch = grouped_heads().cuda(), long_groups()
    exact, _ = gradient(policy, DAPO(), batch=batch, share_prefixes=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain, _ = gradient(policy, DAPO(), batch=batch, share_prefixes=False)
        packed, _ = gradient(policy, DAPO(), batch=batch)
    assert kernel_calls
    assert (flat(packed) - flat(exact)).norm() < 1.5 * (flat(plain) - flat(exact)).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ligers_kernels_keep_the_gradient_of_packed_rows_in_bf16(checkpointing, kernel_calls):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel (extra: liger)")
    policy, batch = grouped_heads().cuda(), long_groups()
    fused = copy.deepcopy(policy)
    use_elementwise_kernels(fused, "liger", torch.device("cuda", 0))
    exact, _ = gradient(policy, DAPO(), batch=batch, share_prefixes=False)
    if checkpointing:
        fused.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain, _ = gradient(policy, DAPO(), batch=batch)
        found, _ = gradient(fused, DAPO(), batch=batch)
    assert kernel_calls
    rounding = (flat(plain) - flat(exact)).norm()
    assert 0 < (flat(found) - flat(exact)).norm() < 1.5 * rounding
    assert not torch.equal(flat(found), flat(plain))


# Mean and largest difference; on a CPU they are 5e-7 and 7e-5 in fp32, 0.005 and 0.2 in bf16.
@pytest.mark.parametrize(("dtype", "mean", "largest"), [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 0.03, 1.0)])
def test_the_transformers_engine_reads_one_copy_of_a_prompt(tokenizer, dtype, mean, largest):
    policy = load_policy(REASONER).to("cuda", dtype)
    policy.set_attn_implementation("rpo_shared_prefix")
    asked = requests(tokenizer, samples=4)
    outputs = generated(policy, tokenizer, asked)
    exact = policy.to("cpu", torch.float32)  # what bf16 rounded the weights to
    for request, completions in zip(asked, outputs, strict=True):
        for completion in completions:
            row = request.token_ids + completion.token_ids
            expected = reference_logprobs(exact, row, len(completion.token_ids))
            difference = (torch.tensor(completion.logprobs) - expected).abs()
            assert difference.mean() < mean
            assert difference.max() < largest
