"""The gradient of the entropies equals autograd's, and is there only where it is asked for."""

from __future__ import annotations

import pytest
import torch

from rpo_lightning.policy import output_head
from rpo_lightning.policy.output_head import token_scores
from rpo_lightning.update.objectives import DAPO
from tests.policy.prefix_sharing.test_logprobs import assert_same, gradient, groups


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_have_the_gradient_of_plain_autograd(temperature):
    torch.manual_seed(0)
    logits = torch.randn(150, 11, dtype=torch.float64) * 3  # more rows than are computed at once
    logits[0, 3] = -torch.inf  # a token that the model rules out
    token, weights = torch.randint(4, 11, (150,)), torch.randn(2, 150, dtype=torch.float64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scores = token_scores(ours, token, temperature, entropy_gradient=True)
    (scores * weights).sum().backward()
    chosen = torch.distributions.Categorical(logits=plain[:, [i for i in range(11) if i != 3]] / temperature)
    rest = torch.distributions.Categorical(logits=plain[1:] / temperature)
    entropy = torch.cat([chosen.entropy()[:1], rest.entropy()])
    logprobs = (plain / temperature).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    expected = torch.stack([logprobs, entropy])
    torch.testing.assert_close(scores, expected)
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=1e-9)


def test_an_entropy_that_is_only_logged_has_no_gradient():
    logits = torch.randn(4, 5, requires_grad=True)
    token_scores(logits, torch.tensor([0, 1, 2, 3]), 1.0)[1].sum().backward()
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_the_gradient_of_an_update_with_a_bonus_is_that_of_the_mean_entropy(exact_policy, chunked, monkeypatch):
    """Chunks of the output head are computed again in the backward pass."""
    if chunked:
        monkeypatch.setattr(output_head.scoring.__wrapped__, "__defaults__", (3 * 48,))
    plain = gradient(exact_policy, DAPO())
    found = gradient(exact_policy, DAPO(entropy_bonus=0.5))
    exact_policy.zero_grad()
    entropies = []
    for group in groups():
        for member in range(3):
            ids = group.request.prompt.token_ids + group.response_ids(member)
            logits = exact_policy(input_ids=torch.tensor([ids])).logits[0, :-1]
            count = len(group.completions[member].token_ids)
            entropies.append(torch.distributions.Categorical(logits=logits[-count:]).entropy())
    (-0.5 * torch.cat(entropies).mean()).backward()
    bonus = {n: p.grad.clone() for n, p in exact_policy.named_parameters()}
    assert_same(found, {n: plain[n] + bonus[n] for n in plain}, 1e-10)
    assert max(g.abs().max() for g in bonus.values()) > 1e-4


def test_a_bonus_raises_the_entropy(exact_policy):
    """A step against the gradient of the loss, without rewards that differ."""
    batch = groups()
    for group in batch:
        group.rewards = [1.0] * 3
    before = mean_entropy(exact_policy)
    found = gradient(exact_policy, DAPO(entropy_bonus=1.0), batch)
    with torch.no_grad():
        for name, parameter in exact_policy.named_parameters():
            parameter -= 0.01 * found[name]
    assert mean_entropy(exact_policy) > before


def mean_entropy(policy) -> float:
    ids = torch.tensor([groups()[0].request.prompt.token_ids + groups()[0].response_ids(0)])
    return torch.distributions.Categorical(logits=policy(input_ids=ids).logits[0]).entropy().mean().item()
