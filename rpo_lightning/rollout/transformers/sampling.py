"""Draws tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_lightning.rollout.engine import Sampling


def draw(logits_NV: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence.

    Args:
        logits_NV: Raw logits, [N, V].
        sampling: Temperature and truncation.
        generator: Source of randomness.

    Returns:
        Tokens [N] and their log-probs [N] under the temperature-scaled policy, before ``top_p``, ``top_k`` and
        ``min_p``. The trainer computes the same log-probs. Where logits are not finite, any token is drawn, and its
        log-prob is NaN: the update finds it.
    """
    logits_NV = logits_NV.float()
    if sampling.temperature == 0:
        logprobs_NV = logits_NV.log_softmax(-1)
        token_N = logits_NV.argmax(-1)
        return token_N, logprobs_NV.gather(1, token_N[:, None]).squeeze(1)
    logprobs_NV = (logits_NV / sampling.temperature).log_softmax(-1)
    probs_NV = logprobs_NV.exp()
    broken_N1 = logprobs_NV[:, :1].isnan()  # a row is NaN as a whole
    if broken_N1.device.type != "cpu" or broken_N1.any():  # asking costs nothing on a CPU, and a wait on a GPU
        probs_NV = probs_NV.masked_fill(broken_N1, 1.0)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        probs_NV = _truncate(probs_NV, sampling)
    token_N = _pick(probs_NV, generator)
    return token_N, logprobs_NV.gather(1, token_N[:, None]).squeeze(1)


def _truncate(probs_NV: Tensor, sampling: Sampling) -> Tensor:
    """Set excluded tokens to 0: top-k first, then top-p, as in transformers and vLLM. The likeliest token stays.

    ``min_p`` compares with the likeliest token, which always stays, so its order matters only together with top-p. It
    comes last, as in transformers; in vLLM it comes first.
    """
    ordered_NV, index_NV = probs_NV.sort(-1, descending=True)
    if sampling.top_k:
        ordered_NV[:, sampling.top_k :] = 0.0
        ordered_NV /= ordered_NV.sum(-1, keepdim=True)
    excluded_NV = ordered_NV.cumsum(-1) - ordered_NV >= sampling.top_p
    excluded_NV |= ordered_NV < sampling.min_p * ordered_NV[:, :1]
    return torch.zeros_like(probs_NV).scatter(1, index_NV, ordered_NV.masked_fill(excluded_NV, 0.0))


def _pick(probs_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token a row, by inverting its cumulative distribution at a random number.

    ``torch.multinomial`` is slow on a CPU: it draws a random number for every entry of the vocabulary, one after the
    other. The cumulative distribution is in fp64, because fp32 loses unlikely tokens in a vocabulary of 100,000.
    """
    if probs_NV.device.type != "cpu":  # multinomial is parallel there, and a cumulative sum may not be deterministic
        return torch.multinomial(probs_NV, 1, generator=generator).squeeze(1)
    cumulated_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    total_N1 = cumulated_NV[:, -1:].contiguous()
    random_N1 = torch.rand(total_N1.shape, generator=generator, device=total_N1.device, dtype=torch.float64)
    # The product may be rounded up to the total. Stay below it: no token lies beyond.
    level_N1 = torch.minimum(random_N1 * total_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    return torch.searchsorted(cumulated_NV, level_N1, right=True).squeeze(1)
