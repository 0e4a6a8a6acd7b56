"""Log-probs and gradients equal an independent computation, however the batch is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpo_lightning.policy.output_head import token_scores
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow, rows_of
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import CISPO, DAPO, DPPO, DPPOKL, GRPO, GSPO, SAPO, DrGRPO, GSPOToken, Objective
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_group

# Two groups with different prompts, prefixes and suffix lengths. Ids are those of the arithmetic tokenizer.
GROUPS = [
    ([1.0, 0.0, 0.0], [(8, 9, 10, 2), (11, 2), (12, 13, 2)], (1, 4, 5, 6), (20, 21, 22)),
    ([0.2, 0.9, 0.4], [(9, 2), (5, 6, 7, 8, 9, 2), (7, 7, 7, 7)], (1, 30, 31), ()),
]

# transformers' RMSNorm computes in fp32 for any dtype of the model. Terms that cancel leave this much.
ALGEBRA = 2e-6


def groups(finished=(True, True, True)):
    return [
        make_group(rewards, suffixes, prompt, prefix, uid=str(i), finished=finished)
        for i, (rewards, suffixes, prompt, prefix) in enumerate(GROUPS)
    ]


def reference_logprobs(policy, token_ids: tuple[int, ...], count: int, temperature: float = 1.0) -> Tensor:
    """Log-probs of the last ``count`` tokens of one unpadded row."""
    ids = torch.tensor([token_ids])
    logits = policy(input_ids=ids).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)[-count:]


def settings(**changes) -> UpdateSettings:
    return UpdateSettings(**{"micro_batch_tokens": 10**6, **changes})


def gradient(policy, objective: Objective, batch=None, **changes) -> dict[str, Tensor]:
    policy.zero_grad()
    loss = PolicyLoss(policy, None, objective, settings(**changes), pad_id=0)
    batch = batch or groups()
    loss.backward(batch, group_advantages([g.rewards for g in batch]), lambda x, _: x.backward())
    return {n: p.grad.clone() for n, p in policy.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def alone(rows: list[Row]) -> list[SharedRow]:
    return [SharedRow((row,)) for row in rows]


def together(rows: list[Row]) -> list[SharedRow]:
    return [SharedRow(tuple(r for r in rows if r.group == g)) for g in sorted({r.group for r in rows})]


@pytest.mark.parametrize("arrange", [alone, together])
@pytest.mark.parametrize("scope", ["suffix", "response"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_batch_equal_those_of_single_rows(policy, arrange, scope, temperature):
    policy.set_attn_implementation(IMPLEMENTATION)
    computed = token_logprobs(policy, arrange(rows_of(groups(), scope)), temperature, pad_id=0, device=policy.device)
    assert len(computed.rows) == 6
    for i, row in enumerate(computed.rows):
        expected = reference_logprobs(policy, row.context_ids + row.suffix_ids, row.scope_length, temperature)
        torch.testing.assert_close(computed.logprobs_BS[i][computed.mask_BS[i]], expected, atol=1e-5, rtol=0)


def test_the_scope_is_the_suffix_or_the_whole_response():
    suffix, response = (rows_of(groups(), scope) for scope in ("suffix", "response"))
    assert [r.scope_length for r in suffix] == [4, 2, 3, 2, 6, 4]
    assert [r.scope_length for r in response] == [7, 5, 6, 2, 6, 4]
    assert suffix[0].context_ids == (1, 4, 5, 6, 20, 21, 22)
    assert suffix[0].suffix_ids == (8, 9, 10, 2)


@pytest.mark.parametrize("arrange", [alone, together])
def test_entropy_equals_the_categorical_distributions(policy, arrange):
    policy.set_attn_implementation(IMPLEMENTATION)
    rows = rows_of(groups()[:1], "suffix")
    computed = token_logprobs(policy, arrange(rows), 1.0, pad_id=0, device=policy.device)
    logits = policy(input_ids=torch.tensor([rows[0].context_ids + rows[0].suffix_ids])).logits[0, -5:-1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(computed.entropy_BS[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "objective", [DAPO(), GRPO(), DrGRPO(16), GSPO(), GSPOToken(), CISPO(), SAPO(), DPPO(), DPPOKL()]
)
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(exact_policy, objective):
    assert_same(gradient(exact_policy, objective), gradient(exact_policy, objective, micro_batch_tokens=1))


def test_the_dapo_gradient_equals_plain_autograd_on_single_rows(exact_policy):
    policy = exact_policy
    policy.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for rewards, suffixes, prompt, prefix in GROUPS:
        r = torch.tensor(rewards, dtype=torch.float64)
        for advantage, suffix in zip((r - r.mean()) / (r.std() + 1e-6), suffixes, strict=True):
            # On-policy the ratio is 1 and its gradient that of the log-prob.
            total = total - advantage * reference_logprobs(policy, (*prompt, *prefix, *suffix), len(suffix)).sum()
            tokens += len(suffix)
    (total / tokens).backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters()}
    assert_same(expected, gradient(policy, DAPO()), tolerance=1e-12)


def test_with_a_token_mean_the_prefix_terms_cancel(policy):
    """Suffix and response scope differ in their normaliser only."""
    policy = policy.double()
    batch = groups()[:1]
    suffix = gradient(policy, DAPO(), batch)
    response = gradient(policy, DAPO(), batch, loss_scope="response")
    assert_same(suffix, {n: g * (9 + 9) / 9 for n, g in response.items()}, tolerance=ALGEBRA)


def test_with_sequence_means_the_prefix_leaves_a_length_artefact(policy):
    policy = policy.double()
    batch = groups()[:1]
    suffix = gradient(policy, GRPO(), batch)
    response = gradient(policy, GRPO(), batch, loss_scope="response")
    prompt, prefix, suffixes = GROUPS[0][2], GROUPS[0][3], GROUPS[0][1]
    rewards = torch.tensor(GROUPS[0][0], dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    lengths = [len(prefix) + len(s) for s in suffixes]
    policy.zero_grad()
    of_prefix = reference_logprobs(policy, prompt + prefix, len(prefix)).sum()
    artefact = sum(-a / n for a, n in zip(advantages, lengths, strict=True)) / 3 * of_prefix
    of_suffixes = sum(
        -a / n * reference_logprobs(policy, (*prompt, *prefix, *s), len(s)).sum()
        for a, n, s in zip(advantages, lengths, suffixes, strict=True)
    )
    (artefact + of_suffixes / 3).backward()
    assert_same({n: p.grad for n, p in policy.named_parameters()}, response, tolerance=ALGEBRA)
    assert any((suffix[n] - response[n]).abs().max() > 1e-4 for n in suffix)


def test_masking_truncated_responses_takes_them_out_of_loss_and_denominator(exact_policy):
    policy = exact_policy
    masked = gradient(policy, DAPO(), groups(finished=(True, False, True)), mask_truncated=True)
    policy.zero_grad()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rewards, suffixes, prompt, prefix in GROUPS:
        r = torch.tensor(rewards, dtype=torch.float64)
        advantages = (r - r.mean()) / (r.std() + 1e-6)
        for i in (0, 2):
            row = (*prompt, *prefix, *suffixes[i])
            total = total - advantages[i] * reference_logprobs(policy, row, len(suffixes[i])).sum()
            tokens += len(suffixes[i])
    (total / tokens).backward()
    assert_same({n: p.grad for n, p in policy.named_parameters()}, masked, tolerance=1e-12)


def test_old_log_probs_make_the_ratio_and_equal_the_policy_that_sampled(policy):
    batch = groups()
    loss = PolicyLoss(policy, None, DAPO(), settings(), pad_id=0)
    loss.store_old_logprobs(batch)
    for group in batch:
        for i, old in enumerate(group.old_logprobs):
            row = group.request.prompt.token_ids + group.response_ids(i)
            expected = reference_logprobs(policy, row, len(old))
            torch.testing.assert_close(torch.tensor(old), expected, atol=1e-5, rtol=0)
    advantages = group_advantages([g.rewards for g in batch])
    assert loss.backward(batch, advantages, lambda x, _: x.backward())["loss/ratio_deviation_max"] < 1e-5
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    assert loss.backward(batch, advantages, lambda x, _: x.backward())["loss/ratio_deviation_max"] > 0.01


def test_log_probs_that_were_interrupted_are_not_half_stored(policy, monkeypatch):
    batch = groups()
    loss = PolicyLoss(policy, None, DAPO(), settings(micro_batch_tokens=20), pad_id=0)
    assert len(loss._passes(rows_of(batch, "suffix"), gradient=False)) > 1
    whole, calls = loss._logprobs, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(loss, "_logprobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss.store_old_logprobs(batch)
    assert [group.old_logprobs for group in batch] == [None, None]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_distribution_in_full_precision(temperature, dtype):
    """Also where logits are bf16, autocast is on, and the model rules a token out."""
    logits = (10 * torch.randn(5, 40)).to(dtype)
    logits[0, 3] = -torch.inf
    tokens = torch.arange(5) + 4
    exact = logits.double().detach().requires_grad_()
    distribution = torch.distributions.Categorical(logits=exact / temperature, validate_args=False)
    logits = logits.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = token_scores(logits, tokens, temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(tokens).float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy().float(), atol=1e-4, rtol=1e-4)
    weights = torch.randn(5)
    (logprobs * weights).sum().backward()
    (distribution.log_prob(tokens) * weights).sum().backward()
    torch.testing.assert_close(
        logits.grad.float(), exact.grad.float(), atol=1e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )
