"""Log-probs and entropies straight from hidden states, without the logits of whole rows.

While a model runs, its output head computes log-probs of given tokens instead of logits. It works on the positions
that are needed, in chunks, and computes the logits of a chunk again in the backward pass. Peak memory depends on the
chunk, not on row length times vocabulary. All of it runs inside the model's own forward pass: sharding hooks, autocast
and adapters on the head keep working.

Liger's fused linear cross-entropy is no replacement. A policy loss weighs the log-prob of each token; Liger's
gradients are wrong for that before July 2026 (linkedin/Liger-Kernel, pull request 1298). It also gives no entropies.

Shape suffixes are those of ``core/types.py``, and ``K`` for scored tokens, ``H`` for the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits of one chunk; in fp32 they take 256 MiB.
CHUNK_ELEMENTS = 2**26
# Positions whose entropies are computed at once.
_ENTROPY_ROWS = 64


@dataclass(frozen=True)
class Targets:
    """Which tokens to score.

    Attributes:
        position_K: Position of the token before each scored token, counted through all rows.
        token_K: The scored tokens.
        temperature: Divides the logits.
        entropy_gradient: Whether the entropies have a gradient. It costs a pass over the logits in the backward pass.
    """

    position_K: Tensor
    token_K: Tensor
    temperature: float
    entropy_gradient: bool = False


@contextmanager
def scoring(model: Any, targets: Targets, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[None]:
    """Within this context ``model(...).logits`` are log-probs and entropies of the targets, [2, K].

    Args:
        model: A transformers causal language model, possibly wrapped by PEFT.
        targets: What to score.
        chunk_elements: How many logits to hold at once.
    """
    head = model.get_output_embeddings()
    apply: Callable[[Tensor], Tensor] = head.forward

    def score(hidden_BTH: Tensor) -> Tensor:
        hidden_KH = hidden_BTH.flatten(0, 1)[targets.position_K]
        size = max(1, chunk_elements // model.config.get_text_config().vocab_size)
        chunks = list(zip(hidden_KH.split(size), targets.token_K.split(size), strict=True))
        # A single chunk is held in any case; computing it twice saves nothing.
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        scored = [
            checkpoint(_score, apply, hidden, token, targets, use_reentrant=False)
            if recompute
            else _score(apply, hidden, token, targets)
            for hidden, token in chunks
        ]
        return torch.cat(scored, dim=1)

    of_instance = "forward" in head.__dict__
    head.forward = score
    try:
        yield
    finally:
        if of_instance:
            head.forward = apply
        else:
            del head.forward  # uncovers the method of the class


def _score(apply: Callable[[Tensor], Tensor], hidden_KH: Tensor, token_K: Tensor, targets: Targets) -> Tensor:
    logits_KV = apply(hidden_KH)
    return token_scores(logits_KV, token_K, targets.temperature, targets.entropy_gradient)


def token_scores(logits_KV: Tensor, token_K: Tensor, temperature: float, entropy_gradient: bool = False) -> Tensor:
    """Log-probs of tokens (with gradient) and entropies, [2, K], in fp32 or fp64.

    Args:
        logits_KV: Logits, [K, V].
        token_K: The tokens, [K].
        temperature: Divides the logits.
        entropy_gradient: Whether the entropies have a gradient too.
    """
    logprobs_K, entropy_K = _TokenScores.apply(logits_KV, token_K, temperature, entropy_gradient)
    return torch.stack([logprobs_K, entropy_K])


class _TokenScores(torch.autograd.Function):
    """Log-probs and entropies; saves one tensor of the logits' size for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits_KV: Tensor, token_K: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        scaled_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
        if temperature != 1:
            scaled_KV = scaled_KV / temperature
        logprobs_KV = torch.log_softmax(scaled_KV, -1)
        logprobs_K = logprobs_KV.gather(-1, token_K[:, None]).squeeze(-1)
        probs_KV = logprobs_KV.exp()
        del scaled_KV, logprobs_KV
        # entr(0) is 0, as it must be for a token that the model rules out. In parts, because entr makes another tensor.
        entropy_K = torch.cat([torch.special.entr(part).sum(-1) for part in probs_KV.split(_ENTROPY_ROWS)])
        ctx.save_for_backward(probs_KV, token_K, entropy_K)
        ctx.temperature, ctx.dtype, ctx.entropy_gradient = temperature, logits_KV.dtype, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_K)
        return logprobs_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        probs_KV, token_K, entropy_K = ctx.saved_tensors
        gradient_K = gradients[0][:, None] / ctx.temperature
        gradient_KV = probs_KV * -gradient_K
        gradient_KV.scatter_add_(-1, token_K[:, None], gradient_K)
        if ctx.entropy_gradient:
            # The derivative by logit j is -p_j (log p_j + entropy).
            parts = (x.split(_ENTROPY_ROWS) for x in (gradient_KV, probs_KV, entropy_K, gradients[1] / ctx.temperature))
            for into, probs, entropy, gradient in zip(*parts, strict=True):
                into += gradient[:, None] * (torch.special.entr(probs) - probs * entropy[:, None])
        return gradient_KV.to(ctx.dtype), None, None, None
