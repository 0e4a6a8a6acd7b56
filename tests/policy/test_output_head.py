"""The gradient of the entropies equals autograd's, and is there only where it is asked for."""

from __future__ import annotations

import pytest
import torch

from rpo_lightning.policy.output_head import token_scores


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
