"""Shared rows are exact for every objective, chosen where they are cheaper, and refused where they would be wrong."""

from __future__ import annotations

import copy
import logging
import weakref
from itertools import combinations, pairwise

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from rpo_lightning.core.errors import ConfigurationError, UpdateError
from rpo_lightning.policy import output_head
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION
from rpo_lightning.policy.prefix_sharing.compatibility import needs_full_logits, row_cost, sharing_obstacle
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import Row, RowCost, SharedRow, micro_batches, rows_of, shared_rows
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.update import loss as update
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import CISPO, DAPO, DPPO, DPPOKL, GRPO, GSPO, SAPO, DrGRPO, GSPOToken
from rpo_lightning.update.reference import FrozenCopy
from tests.conftest import make_data, make_group, make_module, make_trainer, passes_with_gradient
from tests.policy.prefix_sharing.test_logprobs import (
    ALGEBRA,
    alone,
    assert_same,
    groups,
    reference_logprobs,
    settings,
    together,
)

# Largest error of any parameter's gradient, in fp64.
GOAL = 1e-10


def sharing_wherever_it_may(loss):
    """Ignores costs: in the small models of these tests sharing rarely pays."""
    cost = loss._row_cost
    loss._row_cost = RowCost(shares=cost.shares, longest_shared=cost.longest_shared, holds=cost.holds)
    return loss


def gradient(policy, objective, reference=None, batch=None, **changes):
    policy.zero_grad()
    reference = reference and FrozenCopy(reference)
    loss = sharing_wherever_it_may(PolicyLoss(policy, reference, objective, settings(**changes), pad_id=0))
    batch = batch or groups()
    metrics = loss.backward(batch, group_advantages([g.rewards for g in batch]), lambda x, _: x.backward())
    metrics["tokens"] = loss.processed_tokens["update"]
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}, metrics


@pytest.mark.parametrize(
    "objective",
    [
        DAPO(), GRPO(beta=0.1), DrGRPO(16), GSPO(), CISPO(), SAPO(), DPPO(), DPPOKL(), GSPOToken(),
        DAPO(entropy_bonus=0.5),
    ],
    ids=lambda o: type(o).__name__ + ("+entropy" if o.entropy_bonus else ""),
)  # fmt: skip
@pytest.mark.parametrize("scope", ["suffix", "response"])
def test_shared_rows_give_the_gradient_of_plain_rows(exact_policy, objective, scope):
    reference = None
    if objective.beta:
        reference = copy.deepcopy(exact_policy)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
    plain, expected = gradient(exact_policy, objective, reference, loss_scope=scope, share_prefixes=False)
    shared, metrics = gradient(exact_policy, objective, reference, loss_scope=scope)
    assert_same(plain, shared, GOAL)
    # Contexts have 7 and 3 tokens, suffixes 9 and 12: plain rows share nothing, shared rows share all.
    assert (expected["tokens"], metrics["tokens"]) == (3 * 7 + 9 + 3 * 3 + 12, 7 + 9 + 3 + 12)
    for name in ("loss/total", "loss/entropy", "loss/kl"):
        assert metrics[name] == pytest.approx(expected[name], abs=GOAL)
    # Both groups (16 and 15 tokens) exceed this budget and take two passes each.
    split, metrics = gradient(exact_policy, objective, reference, loss_scope=scope, micro_batch_tokens=14)
    # With suffixes in the loss contexts are computed once, but for their last tokens. With responses they are repeated.
    contexts = (6 + 2) + (2 + 2) if scope == "suffix" else 2 * 7 + 2 * 3
    assert metrics["tokens"] == contexts + 9 + 12
    assert_same(plain, split, GOAL)


@pytest.mark.parametrize("prefix_gradient", [True, False])
def test_shared_rows_work_under_bf16_autocast(policy, prefix_gradient):
    def under_autocast(**changes):
        policy.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients, metrics = gradient(policy, DAPO(), **changes)
        return torch.cat([g.flatten() for g in gradients.values()]), metrics

    exact, _ = gradient(policy, DAPO(), prefix_gradient=prefix_gradient)
    exact = torch.cat([g.flatten() for g in exact.values()])
    shared, metrics = under_autocast(prefix_gradient=prefix_gradient)
    assert metrics["tokens"] == 31
    plain, _ = under_autocast(share_prefixes=False)
    cosine = torch.nn.functional.cosine_similarity
    for expected in (exact, plain) if prefix_gradient else (exact,):
        assert cosine(shared, expected, dim=0) > 0.99
        assert (shared.norm() / expected.norm()).item() == pytest.approx(1, abs=0.02)


def test_without_prefix_gradient_only_the_prefix_keys_and_values_are_constants(exact_policy):
    """Compared with the model itself: one member at a time continues a cache that was filled without gradient."""
    batch = groups()
    detached, metrics = gradient(exact_policy, DAPO(), batch=batch, prefix_gradient=False)
    exact, expected = gradient(exact_policy, DAPO(), batch=batch)
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], abs=GOAL)
    exact_policy.zero_grad()
    rows = rows_of(batch, "suffix")
    advantages = group_advantages([g.rewards for g in batch])
    for row in rows:
        cache = DynamicCache(config=exact_policy.config)
        with torch.no_grad():
            exact_policy(torch.tensor([row.context_ids[:-1]]), past_key_values=cache)
        logits = exact_policy(torch.tensor([row.context_ids[-1:] + row.suffix_ids]), past_key_values=cache).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row.suffix_ids)[:, None])
        (-advantages[row.group][row.member] * logprobs.sum() / sum(r.scope_length for r in rows)).backward()
    expected_gradient = {n: p.grad.clone() for n, p in exact_policy.named_parameters()}
    assert_same(expected_gradient, detached, GOAL)
    assert max((detached[n] - exact[n]).abs().max() for n in exact) > 1e-4  # it is another gradient
    split, _ = gradient(exact_policy, DAPO(), batch=batch, prefix_gradient=False, micro_batch_tokens=14)
    assert_same(detached, split, GOAL)
    exact_policy.gradient_checkpointing_enable({"use_reentrant": False})
    exact_policy.train()
    layers = passes_with_gradient(exact_policy)
    assert_same(detached, gradient(exact_policy, DAPO(), batch=batch, prefix_gradient=False)[0], GOAL)
    assert layers == [0, 1, 1, 0]


def test_prefixes_without_gradient_need_shared_rows(caplog):
    recurrent = tiny(MambaForCausalLM, MambaConfig, state_size=4)
    with pytest.raises(UpdateError, match="prefix_gradient"):
        PolicyLoss(recurrent, None, DAPO(), settings(prefix_gradient=False), pad_id=0)
    with pytest.raises(ConfigurationError, match="loss_scope=suffix"):
        make_module(prefix_gradient=False, loss_scope="response")


@pytest.mark.parametrize("scope", ["suffix", "response"])
def test_old_log_probs_come_from_shared_rows_too(exact_policy, monkeypatch, scope):
    computed = []

    def note(model, batch, *args):
        computed.extend(batch)
        return token_logprobs(model, batch, *args)

    monkeypatch.setattr(update, "token_logprobs", note)
    plain, shared = groups(), groups()
    for batch, share, members in ((plain, False, [1] * 6), (shared, True, [3, 3])):
        loss = PolicyLoss(exact_policy, None, DAPO(), settings(share_prefixes=share, loss_scope=scope), pad_id=0)
        computed.clear()
        sharing_wherever_it_may(loss).store_old_logprobs(batch)
        assert members_per_row(computed) == members
    for first, second in zip(plain, shared, strict=True):
        prompt = first.request.prompt.token_ids
        for member, (a, b) in enumerate(zip(first.old_logprobs, second.old_logprobs, strict=True)):
            count = len(first.completions[member].token_ids) if scope == "suffix" else len(first.response_ids(member))
            with torch.no_grad():
                expected = reference_logprobs(exact_policy, prompt + first.response_ids(member), count).tolist()
            assert a == pytest.approx(expected, abs=1e-12)
            assert b == pytest.approx(expected, abs=1e-12)


def test_gradient_checkpointing_and_adapters_keep_working(exact_policy):
    adapted = get_peft_model(
        exact_policy, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    layers = passes_with_gradient(exact_policy)
    plain, _ = gradient(adapted, DAPO(), share_prefixes=False)
    layers.clear()
    shared, metrics = gradient(adapted, DAPO())
    assert layers == [0, 1]
    assert metrics["tokens"] == 31
    assert len(plain) == 6  # the adapters alone
    assert all(value.abs().max() > 1e-6 for value in plain.values())
    assert_same(plain, shared, GOAL)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    layers.clear()
    assert_same(plain, gradient(adapted, DAPO())[0], GOAL)
    assert layers == [0, 1, 1, 0]  # every layer once more, in the backward pass


def test_chunks_of_the_output_head_change_nothing_and_keep_no_logits(exact_policy, monkeypatch):
    whole, expected = gradient(exact_policy, DAPO())
    vocabulary = exact_policy.config.vocab_size
    monkeypatch.setattr(output_head.scoring.__wrapped__, "__defaults__", (4 * vocabulary,))
    saved = []

    def note(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked, metrics = gradient(exact_policy, DAPO())
    assert_same(whole, chunked, 1e-12)
    assert metrics["loss/entropy"] == pytest.approx(expected["loss/entropy"], abs=1e-12)
    assert not [shape for shape in saved if len(shape) and shape[-1] == vocabulary and shape[0] != 32]


class LiveTensors(TorchDispatchMode):
    """Peak bytes of the tensors made within it. Equal on every run, unlike a process's size."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._bytes:
                    self._bytes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._bytes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result


def test_peak_memory_of_scoring_does_not_grow_with_vocabulary_times_row_length(monkeypatch):
    """In forward and backward pass, longer rows add as much memory for a large vocabulary as for a small one."""
    small, large, short, long = 512, 2048, 16, 128
    monkeypatch.setattr(output_head.scoring.__wrapped__, "__defaults__", (8 * large,))

    def peak(vocabulary, suffix, full_logits):
        model = tiny(MistralForCausalLM, MistralConfig, **ATTENTION, sliding_window=None, vocab_size=vocabulary)
        model.set_attn_implementation(IMPLEMENTATION)
        with LiveTensors() as live:
            computed = token_logprobs(
                model, [SharedRow(tuple(rows(8, [suffix] * 4)))], 1.0, 0, model.device, full_logits
            )
            computed.logprobs_BS.sum().backward()
        return live.peak

    def growth(vocabulary, full_logits):
        return peak(vocabulary, long, full_logits) - peak(vocabulary, short, full_logits)

    # The smallest difference if the logits of whole rows are held in fp32.
    of_logits = 4 * (large - small) * 4 * (long - short)
    assert growth(large, full_logits=True) - growth(small, full_logits=True) >= of_logits
    assert abs(growth(large, full_logits=False) - growth(small, full_logits=False)) < 0.01 * of_logits


def rows(context: int, suffixes: list[int], group: int = 0) -> list[Row]:
    return [Row(group, i, tuple(range(context)), tuple(range(n)), n) for i, n in enumerate(suffixes)]


def members_per_row(shared) -> list[int]:
    return sorted(len(row.members) for row in shared)


def test_members_share_a_row_where_the_cost_says_so():
    cost = RowCost(attention=1e-3, branch=0.1)
    assert members_per_row(shared_rows(rows(1024, [64] * 6), 10**6, cost)) == [6]
    assert members_per_row(shared_rows(rows(16, [512] * 6), 10**6, cost)) == [1] * 6
    assert members_per_row(shared_rows(rows(16, [64, 2000]), 10**6, cost)) == [1, 1]
    assert members_per_row(shared_rows(rows(1024, [64] * 6), 10**6, RowCost(shares=False))) == [1] * 6
    assert members_per_row(shared_rows(rows(100, [20] * 4), 10**6, RowCost(longest_shared=119))) == [1] * 4


def test_branches_cost_a_small_model_more_than_a_large_one(policy):
    small = row_cost(policy, shares=True, full_logits=False)
    large = row_cost(
        tiny(MistralForCausalLM, MistralConfig, **{**ATTENTION, "hidden_size": 256, "intermediate_size": 1024}),
        shares=True, full_logits=False,
    )  # fmt: skip
    assert 0.1 < small.branch < 0.3
    assert large.branch < small.branch / 2
    # Measured by benchmarks/update_phase.py on the embedded reasoner: a gain, then a loss.
    assert members_per_row(shared_rows(rows(182, [100] * 8), 10**6, small)) == [8]
    assert members_per_row(shared_rows(rows(32, [190] * 8), 10**6, small)) == [1] * 8


def test_a_group_longer_than_the_budget_is_split_by_suffixes():
    shared = shared_rows(rows(100, [50] * 6), max_tokens=220, cost=RowCost())
    assert members_per_row(shared) == [2, 2, 2]
    assert all(len(row) == 200 for row in shared)


@pytest.mark.parametrize(
    ("contexts", "shares", "computed"),
    [
        ([100, 90, 80, 70, 60, 50, 40, 10], True, [110 + 100 + 90, 80 + 70 + 60 + 50 + 20]),
        # Filled up to the budget, they would be 300 and 50.
        ([90, 90, 90, 40], True, [100 + 100, 100 + 50]),
        # Plain rows are padded to the longest.
        ([100, 90, 80, 70, 60, 50, 40, 10], False, [2 * 105, 3 * 95, 3 * 85, 4 * 65, 4 * 45]),
    ],
)
def test_micro_batches_are_even_within_the_budget_and_keep_every_row_once(contexts, shares, computed):
    cost = RowCost(shares=shares)
    batch = [row for g, n in enumerate(contexts) for row in shared_rows(rows(n, [5, 5], g), 300, cost)]
    batches = micro_batches(batch, max_tokens=300)
    found = sorted((m.group, m.member) for b in batches for row in b for m in row.members)
    assert found == [(group, member) for group in range(len(contexts)) for member in range(2)]
    assert (len(batches), max(map(size, batches))) == fewest_and_most_even(batch, 300)
    # The tokens that a model gets.
    tokens = []
    model = tiny(MistralForCausalLM, MistralConfig, **ATTENTION, sliding_window=None, vocab_size=128)
    model.set_attn_implementation(IMPLEMENTATION)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    with torch.no_grad():
        for part in batches:
            token_logprobs(model, part, 1.0, 0, model.device)
    assert tokens == computed
    assert max(tokens) <= 300
    assert min(tokens) > 0.5 * max(tokens)


def size(batch: list[SharedRow]) -> int:
    """Shared rows are concatenated, others are padded to the longest."""
    lengths = [len(row) for row in batch]
    return sum(lengths) if any(len(row.members) > 1 for row in batch) else len(lengths) * max(lengths)


def fewest_and_most_even(batch: list[SharedRow], limit: int) -> tuple[int, int]:
    """Number of micro-batches and size of the largest: the best of all ways to cut the rows, sorted by length."""
    ordered = sorted(batch, key=len, reverse=True)
    ways = []
    for cuts in range(len(ordered)):
        for inner in combinations(range(1, len(ordered)), cuts):
            largest = max(size(ordered[start:stop]) for start, stop in pairwise((0, *inner, len(ordered))))
            if largest <= limit:
                ways.append((cuts + 1, largest))
    return min(ways)


def test_the_budget_counts_padding_where_rows_are_padded_and_only_there():
    shared = shared_rows(rows(300, [50, 50], 0), 1000, RowCost())
    plain = [row for g in range(1, 9) for row in shared_rows(rows(45, [5], g), 1000, RowCost())]
    assert [len(b) for b in micro_batches([*shared, *plain], max_tokens=800)] == [9]
    longer = shared_rows(rows(395, [5], 0), 1000, RowCost())
    assert [len(b) for b in micro_batches([*longer, *plain], max_tokens=800)] == [1, 8]


def tiny(kind, config, **settings):
    torch.manual_seed(0)
    base = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
    return kind(config(**{**base, **settings}))


LLAMA_4 = {
    "num_hidden_layers": 4, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
    "pad_token_id": 0, "attn_temperature_tuning": False,
}  # fmt: skip
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def test_models_that_it_would_be_wrong_for_fall_back_to_plain_rows_with_one_reason(caplog):
    deaf = tiny(StableLmForCausalLM, StableLmConfig, **ATTENTION)  # passes no arguments on to its attention
    recurrent = tiny(MambaForCausalLM, MambaConfig, state_size=4)
    dropout = tiny(MistralForCausalLM, MistralConfig, **ATTENTION, attention_dropout=0.1)
    eager = tiny(MistralForCausalLM, MistralConfig, **ATTENTION)
    eager.set_attn_implementation("eager")
    assert "does not keep the members of a shared row apart" in sharing_obstacle(deaf)
    assert sharing_obstacle(recurrent) is not None
    assert "dropout" in sharing_obstacle(dropout)
    assert "need 'sdpa'" in sharing_obstacle(eager)
    for model in (deaf, recurrent, dropout, eager):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert not row_cost(model, shares=True, full_logits=False).shares
        assert len(caplog.records) == 1
        assert "row of its own" in caplog.text
        plain, _ = gradient(model.double().eval(), DAPO(), share_prefixes=False)
        assert_same(plain, gradient(model, DAPO())[0], GOAL)


def test_a_run_of_several_updates_tells_the_reason_once(tmp_path, caplog, policy, tokenizer):
    policy.set_attn_implementation("eager")
    module = make_module(
        policy=policy, tokenizer=tokenizer, rewards=[UniformRandomReward()], objective=GRPO(beta=0.01),
        passes_per_rollout=2, max_response_tokens=32,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="rpo_lightning"):
        make_trainer(tmp_path, max_steps=6).fit(module, datamodule=make_data())
    assert (module.iteration, module.global_step) == (3, 6)
    reasons = [r.getMessage() for r in caplog.records if "row of its own" in r.getMessage()]
    assert len(reasons) == 1
    assert "need 'sdpa'" in reasons[0]


@pytest.mark.parametrize(
    ("kind", "config", "limit"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
        (Llama4ForCausalLM, Llama4TextConfig, {"attention_chunk_size": 16, **LLAMA_4}),
    ],
    ids=["window", "chunks"],
)
def test_only_sequences_within_a_window_share_rows_and_others_keep_it(kind, config, limit, caplog):
    model = tiny(kind, config, **ATTENTION, **limit).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)  # attention matters
    assert row_cost(model, shares=True, full_logits=False).longest_shared == 16
    assert "at most 16 tokens share rows" in caplog.text
    long, short = [(5, 6, 7, 8) * 8, (9, 4, 3, 8) * 8], [(5, 6, 7), (8, 9, 10), (7, 6, 5)]
    batch = [
        make_group([1.0, 0.0], long, prompt_ids=(11, 12, 13), uid="beyond"),
        make_group([1.0, 0.0, 0.5], short, prompt_ids=(21, 22, 23, 24, 25, 26, 27), uid="within"),
    ]
    plain, of_plain = gradient(model, DAPO(), batch=batch, share_prefixes=False)
    shared, of_shared = gradient(model, DAPO(), batch=batch)
    assert of_shared["tokens"] == of_plain["tokens"] - 2 * 7  # one context instead of three, where it is allowed
    assert_same(plain, shared, 2e-6)


def test_a_model_without_windows_shares_rows_of_any_length():
    wide = tiny(MistralForCausalLM, MistralConfig, **ATTENTION, sliding_window=None)
    assert row_cost(wide, shares=True, full_logits=False).longest_shared is None


def test_layers_whose_queries_depend_on_their_place_in_a_row_do_not_share_rows():
    """They change only after thousands of tokens: a trial would not see it."""
    model = tiny(Llama4ForCausalLM, Llama4TextConfig, **{**ATTENTION, **LLAMA_4, "attn_temperature_tuning": True})
    assert "attn_temperature_tuning" in sharing_obstacle(model)
    assert sharing_obstacle(tiny(Llama4ForCausalLM, Llama4TextConfig, **ATTENTION, **LLAMA_4)) is None


def test_layers_that_select_tokens_do_not_share_rows():
    """They select all of a few tokens: a trial would not see it."""
    model = tiny(MistralForCausalLM, MistralConfig, **ATTENTION, sliding_window=None)
    model.config.layer_types = ["full_attention", "indexed_attention"]
    assert "layers of indexed_attention" in sharing_obstacle(model)


def test_a_model_that_caps_its_logits_is_scored_on_its_own_logits(caplog):
    cap = 0.05
    capped = tiny(Gemma2ForCausalLM, Gemma2Config, **ATTENTION, final_logit_softcapping=cap).double()
    assert needs_full_logits(capped)
    assert "changes its logits after the output head" in caplog.text
    assert not needs_full_logits(tiny(MistralForCausalLM, MistralConfig, **ATTENTION))

    def own_logprobs(row, temperature=1.0):
        """From the layers' output, the head and the cap, one row at a time."""
        ids = torch.tensor([row.context_ids + row.suffix_ids])
        raw = capped.lm_head(capped.model(ids).last_hidden_state)[0, :-1]
        logits = cap * torch.tanh(raw / cap) / temperature
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-row.scope_length :, 0]

    batch = groups()
    for scope in ("suffix", "response"):
        expected = [own_logprobs(row, 0.7) for row in rows_of(batch, scope)]
        capped.set_attn_implementation(IMPLEMENTATION)
        for arrange in (alone, together):
            arranged = arrange(rows_of(batch, scope))
            computed, uncapped = (
                token_logprobs(capped, arranged, 0.7, 0, capped.device, full_logits=full) for full in (True, False)
            )
            for index, logprobs in enumerate(expected):
                found, wrong = (x.logprobs_BS[index][x.mask_BS[index]] for x in (computed, uncapped))
                torch.testing.assert_close(found, logprobs, atol=ALGEBRA, rtol=0)
                assert (wrong - logprobs).abs().max() > 1e-3
    # The same holds for the update, whose ratio is 1, and for the old log-probs stored before it.
    members = rows_of(batch, "suffix")
    advantages = group_advantages([g.rewards for g in batch])
    capped.zero_grad()
    for row in members:
        loss = -advantages[row.group][row.member] * own_logprobs(row).sum()
        (loss / sum(r.scope_length for r in members)).backward()
    expected_gradient = {n: p.grad.clone() for n, p in capped.named_parameters()}
    for share, tokens in ((False, 3 * 7 + 9 + 3 * 3 + 12), (True, 7 + 9 + 3 + 12)):
        found, metrics = gradient(capped, DAPO(), batch=batch, share_prefixes=share)
        assert metrics["tokens"] == tokens
        assert_same(expected_gradient, found, ALGEBRA)
    stored = groups()
    PolicyLoss(capped, None, DAPO(), settings(), pad_id=0).store_old_logprobs(stored)
    for row in members:
        found = torch.tensor(stored[row.group].old_logprobs[row.member], dtype=torch.float64)
        torch.testing.assert_close(found, own_logprobs(row), atol=ALGEBRA, rtol=0)


def test_the_trial_does_not_depend_on_the_default_device(exact_policy):
    with torch.device("meta"):
        assert row_cost(exact_policy, shares=True, full_logits=False).shares
        assert not needs_full_logits(exact_policy)


def test_a_policy_that_shared_rows_is_saved_as_any_other(exact_policy, tmp_path):
    gradient(exact_policy, DAPO())
    assert exact_policy.config._attn_implementation == IMPLEMENTATION
    exact_policy.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert type(exact_policy).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Olmo2"])
def test_the_common_families_share_rows(family):
    settings = {**ATTENTION, "sliding_window": None, "pad_token_id": 0, "attention_dropout": 0.0}
    model = tiny(getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config"), **settings)
    assert sharing_obstacle(model) is None
    assert not needs_full_logits(model)
