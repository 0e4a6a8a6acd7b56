"""The whole loss, forward and backward, of six architectures under bf16 autocast, with the GPU's kernels."""

from __future__ import annotations

import copy
from dataclasses import replace

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

from rpo_lightning.policy.prefix_sharing import attention, gpu_check
from rpo_lightning.policy.prefix_sharing.gpu import PackedRows
from rpo_lightning.policy.prefix_sharing.rows import rows_of
from rpo_lightning.update.importance import TokenTruncated
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.mismatch import Mismatch
from rpo_lightning.update.objectives import DAPO
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_group
from tests.runs.pretend_gpu.device import CUDA, PretendTensor, moved

LAYERS, HEAD = 2, 32
SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=HEAD)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=HEAD, query_pre_attn_scalar=HEAD, sliding_window=1024)
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


def loss_of(model, **settings):
    chosen = UpdateSettings(**{"micro_batch_tokens": 8192, **settings})
    return PolicyLoss(model, None, DAPO(), chosen, 0, temperature=0.7, importance_correction=TokenTruncated())


def gradient_of(model, loss):
    """The gradient of an update, flat and in fp32 on the CPU."""
    model.zero_grad()
    advantages = [torch.tensor([1.0, -1.0, -1.0, 1.0], device="cpu")] * len(LENGTHS)
    loss.backward(groups(), advantages, lambda total, _: total.backward())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [x.inner if isinstance(x, PretendTensor) else x for x in gradients]
    return torch.cat([part.clone().float().flatten() for part in parts])


def heads_of():
    """Query heads, key heads and their size."""
    return SIZES["num_attention_heads"], SIZES["num_key_value_heads"], HEAD


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=list(MODELS))
def exact(request):
    """A model on the CPU and the gradient of its plain rows there, in fp32."""
    model = model_of(request.param)
    there = copy.deepcopy(model)
    return model, gradient_of(there, loss_of(there, share_prefixes=False))


@pytest.fixture
def llama(pretend_gpu):
    return moved(model_of("llama"))


def test_shared_rows_have_the_gradient_of_plain_rows_in_fp32(exact, pretend_gpu):
    model, expected = exact
    there = moved(copy.deepcopy(model))
    assert relative(gradient_of(there, loss_of(there)), expected) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_shared_rows_round_no_more_than_plain_rows_under_autocast(exact, pretend_gpu, checkpointing):
    model, expected = exact
    there = moved(copy.deepcopy(model))
    if checkpointing:
        there.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = relative(gradient_of(there, loss_of(there, share_prefixes=False)), expected)
        loss = loss_of(there)
        gpu_check.kernels_agree(CUDA, torch.bfloat16, *heads_of(), "FA2")
        pretend_gpu.clear()
        shared = relative(gradient_of(there, loss), expected)
    assert shared <= 1.5 * plain < 0.05
    # Two calls a layer: contexts and suffixes with themselves, suffixes with their contexts.
    passes = 2 if checkpointing else 1
    assert pretend_gpu.kernels["_flash_attention_forward.default"] == 2 * LAYERS * passes
    assert pretend_gpu.kernels["_flash_attention_backward.default"] == 2 * LAYERS
    assert gpu_check.kernels_agree.cache_info().currsize == 1


@pytest.mark.parametrize("prefix_gradient", [True, False])
def test_the_host_waits_for_the_gpu_a_few_times_an_update_however_many_micro_batches_it_has(
    llama, pretend_gpu, prefix_gradient
):
    waits, copies, batches = [], [], []
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for tokens in (8192, 160):
            loss = loss_of(llama, micro_batch_tokens=tokens, prefix_gradient=prefix_gradient)
            gradient_of(llama, loss)
            made = loss._passes(rows_of(groups(), "suffix"), gradient=prefix_gradient)
            batches.append(len(made))
            pretend_gpu.clear()
            gradient_of(llama, loss)
            # Where no row branches, transformers looks once whether the positions are those of packed rows.
            whole = [step.rows for step in made if step.context is None]
            stacked = sum(not any(row.branches for row in batch) for batch in whole) if prefix_gradient else 0
            waits.append(pretend_gpu.to_host.total() - stacked)
            copies.append(pretend_gpu.to_device.total())
    assert batches[0] == 1 < batches[1]
    assert waits[0] == waits[1] <= 8
    # Token ids and positions, bounds of the kernels, numbers and counts of the loss; then ids and bounds of detached
    # contexts, and which keys are whose. Once an update, what the metrics begin with.
    most = 4 if prefix_gradient else 7
    assert all(copied <= most * count + 4 for copied, count in zip(copies, batches, strict=True)), (copies, batches)


def test_log_probs_of_the_old_policy_are_read_at_once(llama, pretend_gpu):
    loss, of_update = loss_of(llama, micro_batch_tokens=160), groups()
    pretend_gpu.clear()
    loss.store_old_logprobs(of_update)
    read = [line for line in pretend_gpu.to_host.elements() if line.startswith("copy")]
    assert len(read) == 1
    assert [len(x) for x in of_update[0].old_logprobs] == list(LENGTHS[0][2])


def widened(make, **changes):
    """``PackedRows.of`` with a fault in the sequences of suffixes with their contexts."""

    def of(cls, arrangement, where):
        rows = make(cls, arrangement, where)
        return replace(rows, shared=replace(rows.shared, **{k: f(rows.shared) for k, f in changes.items()}))

    return classmethod(of)


FAULTS = {
    "64-bit bounds": ({"query_bounds": lambda s: s.query_bounds.long()}, "int32"),
    "bounds left on the CPU": ({"key_bounds": lambda s: s.key_bounds.inner}, "same device"),
    "a length that is one short": ({"most_keys": lambda s: s.most_keys - 1}, ""),
    "suffixes that begin one token late": ({"queries": lambda s: slice(s.queries.start + 1, None)}, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_kernels_get_is_noticed_by_their_trial(llama, pretend_gpu, monkeypatch, caplog, fault):
    """The trial of the kernels fails on such rows, says so, and rows are computed with masks instead."""
    changes, told = FAULTS[fault]
    expected = gradient_of(llama, loss_of(llama))
    monkeypatch.setattr(PackedRows, "of", widened(PackedRows.of.__func__, **changes))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = loss_of(llama)
        gradient_of(llama, loss)
        pretend_gpu.clear()
        found = gradient_of(llama, loss)
    warning = next(r.message for r in caplog.records if "flash attention" in r.message)
    assert "a trial failed" in warning
    assert told in warning
    assert pretend_gpu.kernels["_flash_attention_forward.default"] == 0
    assert relative(found, expected) < 0.05


def test_queries_in_another_dtype_than_values_are_noticed(llama, pretend_gpu, monkeypatch):
    """Under autocast rotary embeddings return fp32; without the cast no kernel takes them, and rows get masks."""
    monkeypatch.setattr(attention, "same_dtype", lambda *tensors: tensors)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        pretend_gpu.clear()
        gradient_of(llama, loss_of(llama))
    assert pretend_gpu.kernels["_flash_attention_forward.default"] == 0


def test_a_mask_left_on_the_cpu_is_noticed(llama, pretend_gpu, monkeypatch):
    add = Mismatch.add
    monkeypatch.setattr(Mismatch, "add", lambda self, d, sampled, w: add(self, d, sampled.cpu(), w))
    with pytest.raises(RuntimeError, match="same device"):
        gradient_of(llama, loss_of(llama))


def saved_bytes(model, members):
    """Bytes that the backward pass of one group needs, and how many tokens the group has in a shared row."""
    sizes = {}

    def note(tensor):
        storage = (tensor.inner if isinstance(tensor, PretendTensor) else tensor).untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    prefix, suffix = tuple(range(3, 303)), tuple(range(3, 13))
    group = make_group([1.0, 0.0] * (members // 2), [suffix] * members, (1, 2), prefix)
    loss = loss_of(model)
    advantages = [torch.tensor([1.0, -1.0] * (members // 2), device="cpu")]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss.backward([group], advantages, lambda *_: None)  # the kernels are tried here
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss.backward([group], advantages, lambda *_: None)
    weights = sum(p.numel() * 2 for p in model.parameters())  # cast to bf16, whatever the number of tokens
    return sum(sizes.values()) - weights, 302 + members * 10


def test_saved_memory_grows_with_the_tokens_of_a_shared_row_and_not_with_members_times_prefix(llama):
    (few, few_tokens), (many, many_tokens) = saved_bytes(llama, 2), saved_bytes(llama, 16)
    assert many_tokens / few_tokens < 1.5
    assert many / few < 1.15 * many_tokens / few_tokens
