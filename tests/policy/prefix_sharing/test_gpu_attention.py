"""Rows packed for a GPU's kernels: which tokens attend to which, and the gradient. Dense kernels in fp64 stand in."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.attention._registry import _FLASH_ATTENTION_IMPLS

from rpo_lightning.policy.prefix_sharing import attention, compatibility, gpu_check
from rpo_lightning.policy.prefix_sharing import gpu as gpu_attention
from rpo_lightning.policy.prefix_sharing.arrangement import Arrangement
from rpo_lightning.policy.prefix_sharing.gpu import PackedRows
from rpo_lightning.policy.prefix_sharing.rows import RowShape
from rpo_lightning.update.objectives import DAPO
from tests.conftest import passes_with_gradient
from tests.policy.prefix_sharing.test_gpu_check import agree, without_contexts
from tests.policy.prefix_sharing.test_logprobs import assert_same, groups
from tests.policy.prefix_sharing.test_shared_rows import GOAL, gradient

# Calls of the kernel in the trial of a model with two layers: seven rows with gradient through the context (a pass of
# two calls a layer), and five without (a pass for the context, which is one sequence, and one for the rest).
TRIAL_CALLS = 7 * 4 + 5 * (2 + 4)


@pytest.mark.parametrize("scope", ["suffix", "response"])
@pytest.mark.parametrize("budget", [1000, 14])
def test_packed_rows_give_the_gradient_of_plain_rows(exact_policy, packed, scope, budget):
    plain, expected = gradient(exact_policy, DAPO(), loss_scope=scope, share_prefixes=False)
    packed.clear()
    shared, metrics = gradient(exact_policy, DAPO(), loss_scope=scope, micro_batch_tokens=budget)
    assert_same(plain, shared, GOAL)
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], abs=GOAL)
    if budget == 1000:
        # Both groups, of three members each, in one micro-batch: two calls a layer, two layers.
        assert [len(s.query_bounds) - 1 for s in packed[-4:]] == [8, 2, 8, 2]
        assert len(packed) == TRIAL_CALLS + 4


@pytest.mark.parametrize("budget", [1000, 14])
def test_packed_rows_continue_detached_contexts(exact_policy, monkeypatch, request, budget):
    by_spans, expected = gradient(exact_policy, DAPO(), prefix_gradient=False)
    request.getfixturevalue("packed")
    shared, metrics = gradient(exact_policy, DAPO(), prefix_gradient=False, micro_batch_tokens=budget)
    assert_same(by_spans, shared, GOAL)
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], abs=GOAL)


def test_packed_rows_keep_gradient_checkpointing(exact_policy, packed):
    batch = groups()
    plain, _ = gradient(exact_policy, DAPO(), batch=batch)
    exact_policy.gradient_checkpointing_enable({"use_reentrant": False})
    exact_policy.train()
    layers = passes_with_gradient(exact_policy)
    assert_same(plain, gradient(exact_policy, DAPO(), batch=batch)[0], GOAL)
    assert layers == [0, 1, 1, 0]  # every layer once more, in the backward pass


def test_rows_are_packed_as_the_sequences_they_consist_of():
    """Indices by hand, for a row of 2 detached + 1 context + 2 + 3 tokens and one of 1 + 2 + 2 without branches."""
    arrangement = Arrangement.of([RowShape(2, 1, (2, 3)), RowShape(1, 2, (2,))])
    # The first row's context, the second row, the first row's suffixes.
    assert (arrangement.context_starts, arrangement.suffix_starts) == ((0, 1), (5, 3))
    rows = PackedRows.of(arrangement, torch.device("cpu"))
    assert rows.own.queries == slice(None)
    assert rows.own.query_bounds.tolist() == [0, 1, 5, 7, 10]
    # Detached tokens are 0-2, computed ones 3-12. Each sequence's detached part comes before its own.
    assert rows.own.keys.tolist() == [0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert rows.own.key_bounds.tolist() == [0, 3, 8, 10, 13]
    assert (rows.own.most_queries, rows.own.most_keys, rows.own.causal) == (4, 5, True)
    assert rows.shared.queries == slice(5, None)
    assert rows.shared.keys.tolist() == [0, 1, 3]
    assert not rows.shared.causal


def test_nothing_is_picked_by_index_where_nothing_is_detached():
    rows = PackedRows.of(Arrangement.of([RowShape(0, 5, ()), RowShape(0, 3, (2, 3))]), torch.device("cpu"))
    assert (rows.own.queries, rows.own.keys) == (slice(None), slice(None))
    assert (rows.shared.queries, rows.shared.keys) == (slice(8, None), slice(0, 3))
    assert PackedRows.of(Arrangement.of([RowShape(0, 5, ())]), torch.device("cpu")).shared is None


class OnGPU(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu(packed, monkeypatch):
    """Makes ``gpu_check`` decide as on a GPU with the dense kernels, without cached decisions.

    Returns:
        The calls of the kernels, and the function that checks tensors.
    """

    def takes(*tensors):
        return gpu_check.takes(*(x.as_subclass(OnGPU) for x in tensors))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "takes", takes)
    gpu_check.kernels_agree.cache_clear()
    yield packed, takes
    gpu_check.kernels_agree.cache_clear()


def of_trial(calls):
    """For each call of the kernels, whether the trial made it."""
    trial = PackedRows.of(gpu_check._TRIAL, torch.device("cpu"))
    return [any(torch.equal(call.key_bounds, x.key_bounds) for x in (trial.own, trial.shared)) for call in calls]


def test_kernels_are_tried_before_their_first_use(gpu, exact_policy, caplog):
    """Once for all layers and updates, before the first rows."""
    calls, _ = gpu
    policy = exact_policy.bfloat16()
    shared, metrics = gradient(policy, DAPO())
    assert metrics["tokens"] == 31
    # The trial's own and shared sequences. Then, in two layers each, the trial of the model, and a row for each of the
    # two groups.
    assert of_trial(calls) == [True] * 2 + [False] * (TRIAL_CALLS + 4)
    calls.clear()
    gradient(policy, DAPO())
    assert of_trial(calls) == [False] * (TRIAL_CALLS + 4)
    assert not caplog.records
    plain, _ = gradient(policy, DAPO(), share_prefixes=False)
    shared, plain = (torch.cat([g.flatten() for g in x.values()]).float() for x in (shared, plain))
    assert torch.nn.functional.cosine_similarity(shared, plain, dim=0) > 0.99


def test_kernels_whose_trial_fails_are_never_used(gpu, exact_policy, monkeypatch, caplog):
    calls, _ = gpu
    with monkeypatch.context() as patch:
        patch.setattr(attention, "takes", lambda *_: False)
        by_spans, _ = gradient(exact_policy.bfloat16(), DAPO())
    assert not calls
    monkeypatch.setattr(gpu_attention, "_attend_backward", without_contexts)
    for _ in range(2):
        assert_same(by_spans, gradient(exact_policy, DAPO())[0], 0.0)
    assert of_trial(calls) == [True] * 2
    assert len(caplog.records) == 1
    assert "off by" in caplog.text


def test_each_implementation_is_tried_before_its_first_use(gpu, monkeypatch, caplog):
    """The verdict on one is not used for another, and is kept while another is active."""
    calls, takes = gpu
    tensors = [torch.zeros(1, heads, 4, 16, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    right = gpu_attention._attend_backward
    register_flash_attention_impl("MyImpl", register_fn=Replacement)
    try:
        for _ in range(2):
            restore_flash_attention_impl(False)
            monkeypatch.setattr(gpu_attention, "_attend_backward", right)
            assert takes(*tensors)
            activate_flash_attention_impl("MyImpl")
            monkeypatch.setattr(gpu_attention, "_attend_backward", without_contexts)
            assert not takes(*tensors)
    finally:
        restore_flash_attention_impl(False)
        _FLASH_ATTENTION_IMPLS.pop("MyImpl")
    assert of_trial(calls) == [True] * 4
    assert len(caplog.records) == 1
    assert "flash attention (MyImpl)" in caplog.text


class Replacement:
    """An implementation of flash attention; its handle replaces nothing."""

    def remove(self):
        pass


def test_the_trial_is_the_same_in_whatever_surrounds_it(gpu, caplog):
    calls, takes = gpu
    query, key, value = (torch.zeros(1, heads, 4, 16, dtype=torch.bfloat16) for heads in (6, 2, 2))
    state = torch.get_rng_state()
    # As in a model's forward pass: without gradient, under autocast and Lightning's default device.
    for surroundings in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        calls.clear()
        gpu_check.kernels_agree.cache_clear()
        with surroundings, torch.autocast("cpu", dtype=torch.bfloat16):
            assert takes(query, key, value)
        assert of_trial(calls) == [True] * 2
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_kernels_do_not_take_is_not_tried(gpu, monkeypatch):
    calls, takes = gpu

    def tensors(size=16, value_size=16, dtype=torch.bfloat16):
        return [torch.zeros(1, 2, 4, n, dtype=dtype) for n in (size, size, value_size)]

    assert not takes(*tensors(dtype=torch.float32))
    assert not takes(*tensors(12, 12))
    assert not takes(*tensors(264, 264))
    assert not takes(*tensors(16, 24))
    assert not gpu_check.takes(*tensors())  # these are on the CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not takes(*tensors())
    assert not calls


def test_the_trial_within_a_checkpointed_layer_leaves_the_layer_alone(exact_policy, packed, monkeypatch):
    batch = groups()
    plain, _ = gradient(exact_policy, DAPO(), batch=batch)
    exact_policy.gradient_checkpointing_enable({"use_reentrant": False})
    exact_policy.train()
    compatibility.row_cost(exact_policy, shares=True, full_logits=False)
    tried = []

    def takes(query, key, value):
        if torch.is_grad_enabled() and not tried:  # the first call with gradient is in a layer that is computed again
            tried.append(agree())
        return True

    monkeypatch.setattr(attention, "takes", takes)
    monkeypatch.setattr(compatibility, "failure_of_shared_rows", lambda *_: None)
    assert_same(plain, gradient(exact_policy, DAPO(), batch=batch)[0], GOAL)
    assert tried == [True]
