"""A group that takes several passes computes its context once, and gets the gradient of one pass.

That the gradient is exact for all objectives is shown in ``test_shared_rows.py``.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.prefix_sharing import held_context
from rpo_lightning.policy.prefix_sharing.held_context import HeldContext
from rpo_lightning.policy.prefix_sharing.rows import RowCost, rows_of, shared_rows
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO, GRPO
from rpo_lightning.update.passes import passes_of
from rpo_lightning.update.reference import reference_of
from tests.conftest import REASONER, make_group
from tests.policy.prefix_sharing.test_logprobs import assert_same, settings
from tests.policy.prefix_sharing.test_shared_rows import GOAL, gradient, sharing_wherever_it_may

# A context of 40 tokens and four suffixes of 10 take two passes of at most 60 tokens.
BUDGET = 60


def long_group():
    suffixes = [[(5 * i + 7 * j) % 40 + 3 for j in range(10)] for i in range(4)]
    return make_group([1.0, 0.0, 0.3, 0.7], suffixes, tuple(range(3, 13)), tuple(range(10, 40)))


def computed_tokens(model):
    """Number of tokens of every forward pass of the first layer with gradient; it grows as passes are made."""
    passes = []

    def note(_, args, options):
        hidden = args[0] if args else options["hidden_states"]
        if torch.is_grad_enabled():
            passes.append(hidden.shape[1])

    model.get_decoder().layers[0].register_forward_pre_hook(note, with_kwargs=True)
    return passes


def test_the_context_is_computed_once_and_its_last_token_with_each_pass(exact_policy):
    whole, _ = gradient(exact_policy, DAPO(), batch=[long_group()])
    passes = computed_tokens(exact_policy)
    held, metrics = gradient(exact_policy, DAPO(), batch=[long_group()], micro_batch_tokens=BUDGET)
    assert passes == [39, 1 + 20, 1 + 20]
    assert metrics["tokens"] == sum(passes)
    assert_same(whole, held, GOAL)


def test_where_parameters_are_sharded_every_pass_repeats_the_context(exact_policy):
    loss = sharing_wherever_it_may(
        PolicyLoss(exact_policy, None, DAPO(), settings(micro_batch_tokens=BUDGET), 0, holds_contexts=False)
    )
    passes = computed_tokens(exact_policy)
    loss.backward([long_group()], group_advantages([long_group().rewards]), lambda x, _: x.backward())
    assert passes == [60, 60]


def test_checkpointed_layers_are_computed_again_and_the_gradient_stays_exact(exact_policy):
    whole, _ = gradient(exact_policy, DAPO(), batch=[long_group()])
    exact_policy.gradient_checkpointing_enable({"use_reentrant": False})
    exact_policy.train()
    held, _ = gradient(exact_policy, DAPO(), batch=[long_group()], micro_batch_tokens=BUDGET)
    assert_same(whole, held, GOAL)


def test_packed_kernels_continue_a_held_context(exact_policy, packed):
    whole, _ = gradient(exact_policy, DAPO(), batch=[long_group()])
    packed.clear()
    held, _ = gradient(exact_policy, DAPO(), batch=[long_group()], micro_batch_tokens=BUDGET)
    assert_same(whole, held, GOAL)
    assert packed


def test_without_gradient_through_prefixes_a_context_is_computed_once_too(exact_policy, monkeypatch):
    computed, compute = [], held_context.contexts_of
    monkeypatch.setattr(held_context, "contexts_of", lambda *args: computed.append(args) or compute(*args))
    whole, _ = gradient(exact_policy, DAPO(), batch=[long_group()], prefix_gradient=False)
    held, metrics = gradient(
        exact_policy, DAPO(), batch=[long_group()], prefix_gradient=False, micro_batch_tokens=BUDGET
    )
    assert len(computed) == 1
    assert metrics["tokens"] == 39 + 2 * 21
    assert_same(whole, held, GOAL)


def test_an_adapter_and_its_reference_hold_contexts(exact_policy):
    adapted = LoRA(rank=2, target_modules="all-linear").apply(exact_policy).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def of(**changes):
        adapted.zero_grad()
        loss = PolicyLoss(adapted, reference_of(adapted), GRPO(beta=0.1), settings(**changes), 0)
        metrics = sharing_wherever_it_may(loss).backward(
            [long_group()], group_advantages([long_group().rewards]), lambda x, _: x.backward()
        )
        return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}, metrics

    (whole, expected), (held, metrics) = of(), of(micro_batch_tokens=BUDGET)
    assert_same(whole, held, GOAL)
    assert metrics["loss/kl"] == pytest.approx(expected["loss/kl"], abs=GOAL)
    assert expected["loss/kl"] > 1e-3


def test_log_probs_of_the_old_policy_are_those_of_one_pass(exact_policy):
    stored = []
    for budget in (10**6, BUDGET):
        loss = sharing_wherever_it_may(PolicyLoss(exact_policy, None, DAPO(), settings(micro_batch_tokens=budget), 0))
        group = long_group()
        loss.store_old_logprobs([group])
        stored.append(torch.tensor(group.old_logprobs, dtype=torch.float64))
        assert loss.processed_tokens["old_logprobs"] == (80 if budget > BUDGET else 39 + 2 * 21)
    torch.testing.assert_close(*stored, atol=GOAL, rtol=0)


def test_many_passes_in_bf16_round_no_more_than_plain_rows():
    """On average: which of the two is closer for one group is chance, and differs between processors."""
    policy = load_policy(REASONER)
    distances = []
    for shift in range(4):
        suffixes = [[(5 * i + 7 * j + shift) % 40 + 3 for j in range(4)] for i in range(32)]
        group = make_group([float(i % 3) for i in range(32)], suffixes, tuple(range(3, 13)), tuple(range(10, 40)))

        def flat(group=group, **changes):
            return torch.cat([g.flatten() for g in gradient(policy, DAPO(), batch=[group], **changes)[0].values()])

        exact = flat()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            both = [flat(micro_batch_tokens=44, share_prefixes=share) for share in (False, True)]
        distances.append([float((approximate - exact).norm() / exact.norm()) for approximate in both])
    plain, held = (sum(of_kind) / len(distances) for of_kind in zip(*distances, strict=True))
    assert held < 1.1 * plain < 0.1


def test_gradients_of_many_passes_in_bf16_are_summed_in_fp32():
    """In bf16 1 + 2⁻⁹ is 1."""
    policy = load_policy(REASONER).to(torch.bfloat16)
    policy.set_attn_implementation("rpo_shared_prefix")
    held = HeldContext(tuple(range(3, 13)), gradient=True)
    for number in range(1 + 512):
        keys, _ = held.leaves(policy, policy.device)[0]
        keys.grad = torch.full_like(keys, 2.0**-9 if number else 1.0)
    torch.testing.assert_close(held.loss(), 2 * keys.detach().float().sum())


def test_a_context_is_let_go_after_its_last_pass(exact_policy):
    group = long_group()
    rows = shared_rows(rows_of([group], "suffix"), BUDGET, RowCost(holds=True))
    first, _, last = passes_of(rows, BUDGET, None, gradient=True)
    exact_policy.set_attn_implementation("rpo_shared_prefix")
    first.context.leaves(exact_policy, exact_policy.device)[0][0].sum().backward()
    with torch.no_grad():  # what belongs to no graph
        key = weakref.ref(first.context._computed[0][0])
    exact_policy.zero_grad()
    last.context.loss()
    gc.collect()
    assert key() is None


@pytest.mark.parametrize("gradient", [True, False])
def test_a_context_is_let_go_before_that_of_the_next_group_is_computed(exact_policy, monkeypatch, gradient):
    contexts, alive, compute = [], [], held_context.contexts_of

    def noted(*args):
        gc.collect()
        alive.append(sum(context() is not None for context in contexts))
        computed = compute(*args)
        contexts.append(weakref.ref(computed))
        return computed

    monkeypatch.setattr(held_context, "contexts_of", noted)
    chosen = settings(micro_batch_tokens=BUDGET, prefix_gradient=gradient)
    loss = sharing_wherever_it_may(PolicyLoss(exact_policy, None, DAPO(), chosen, 0))
    batch = [long_group(), long_group(), long_group()]
    loss.backward(batch, group_advantages([group.rewards for group in batch]), lambda x, _: x.backward())
    loss.store_old_logprobs(batch)
    assert alive == [0] * 6


def test_repeated_contexts_are_charged_for_each_row_and_held_ones_once():
    """A context of 40, suffixes of 10: 120 tokens in two rows that repeat it, 80 in two that do not."""
    rows = rows_of([long_group()], "suffix")
    for holds, cost in ((False, 2 * 40 + 40), (True, 40 + 40)):
        split = shared_rows(rows, BUDGET, RowCost(holds=holds))
        assert [len(row.members) for row in split] == [2, 2]
        assert RowCost(holds=holds).of(split) == cost
