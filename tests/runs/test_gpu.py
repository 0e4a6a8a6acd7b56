"""What only a GPU can show; skipped elsewhere. ``make test-gpu``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache.cuts import AnchoredCut
from rpo_lightning.cache.refresh import CorrectMemberRefresh
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.prefix_sharing import gpu as packed_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import kernels_agree
from rpo_lightning.rollout import VLLMEngine
from rpo_lightning.rollout.transformers.attention import attended_by_products
from rpo_lightning.update.objectives import DAPO
from tests.conftest import REASONER, make_data, make_group, make_module, make_trainer
from tests.policy.prefix_sharing.test_logprobs import reference_logprobs
from tests.policy.prefix_sharing.test_shared_rows import gradient
from tests.rollout.test_transformers_engine import generated, requests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Calls of the kernels, which are tried anew."""
    calls, attend = [], packed_attention._attend

    def note(q, k, v, sequences, scale):
        calls.append(sequences)
        return attend(q, k, v, sequences, scale)

    monkeypatch.setattr(packed_attention, "_attend", note)
    kernels_agree.cache_clear()
    return calls


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (12, 2, 128), (3, 3, 32)])
def test_torchs_kernels_pass_the_trial(dtype, heads, key_heads, size):
    kernels_agree.cache_clear()
    with torch.device("cuda"):
        assert kernels_agree(torch.device("cuda", 0), dtype, heads, key_heads, size)


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


def test_scores_are_not_rounded_to_16_bits_before_their_softmax():
    """Keys with a large mean: all scores are large, and their small differences decide."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 64, generator=generator) for n in (4, 200, 200))
    query, key, value = (x.bfloat16() for x in (query + 3, key + 3, value))
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    output, _ = attended_by_products(query.cuda(), key.cuda(), value.cuda(), None)
    rounded = scaled_dot_product_attention(query.cuda(), key.cuda(), value.cuda())
    assert (output.cpu() - exact).norm() < 2 * (rounded.cpu() - exact).norm()


@pytest.mark.parametrize("policy", ["tied", "untied"])
@pytest.mark.parametrize("sleep_level", ["0", "1", "2"])
def test_vllm_follows_the_policy_with_cuda_graphs_and_through_sleep(policy, sleep_level):
    command = [
        sys.executable,
        "-m",
        "tests.rollout.vllm_sleep",
        policy,
        sleep_level,
    ]  # a process has one engine that sleeps
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def fit(folder, steps, checkpoint=None, engine=None, **trainer_settings):
    module = make_module(engine=engine)
    cache = ExperienceCacheCallback(AnchoredCut(), CorrectMemberRefresh(), initialisation="lazy")
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(
        folder, accelerator="gpu", precision="bf16-mixed", max_steps=steps, callbacks=[cache, saving],
        **trainer_settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=make_data(), ckpt_path=checkpoint)
    return trainer, module, cache


def test_rpo_trains_on_vllm_in_mixed_precision_and_resumes(tmp_path):
    def engine():
        return VLLMEngine(gpu_memory_utilization=0.2, options={"max_num_seqs": 64})

    trainer, module, cache = fit(tmp_path / "whole", 6, engine=engine())
    assert 0 < trainer.callback_metrics["mismatch/logprob_mean"] < 0.05
    assert any(entry.response is not None for entry in cache.cache)
    checkpoint = next((tmp_path / "whole").glob("*step=4.ckpt"))
    resumed, again, _ = fit(tmp_path / "resumed", 6, checkpoint, engine())
    assert (resumed.global_step, again.iteration) == (6, module.iteration)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains(tmp_path, stage):
    pytest.importorskip("deepspeed")
    start = load_policy(REASONER).state_dict()
    trainer, module, cache = fit(tmp_path, 2, strategy=f"deepspeed_stage_{stage}")
    assert 0 < trainer.callback_metrics["loss/grad_norm"] < 100
    assert any(entry.response is not None for entry in cache.cache)
    module.save_pretrained(tmp_path / "policy")
    end = load_policy(str(tmp_path / "policy")).state_dict()
    change = max((end[name].float().cpu() - before.float()).abs().max() for name, before in start.items())
    assert 1e-5 < change < 1e-2  # two steps of AdamW at 1e-4, and bf16's rounding of weights below 1
