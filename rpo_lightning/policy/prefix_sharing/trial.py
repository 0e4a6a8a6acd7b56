"""Tries shared rows on a few tokens: are members kept apart, and do they get the positions that they are given?

Three questions, of which two have exact answers, in any precision:

* **Members.** Another suffix B must leave the log-probs of suffix A as they are, bit for bit, and the other way round.
  Another context must change both. A layer that mixes tokens in any other way than attention fails here.
* **Positions.** Other positions of A must change the log-probs of A and leave those of B, bit for bit. A model that
  counts its positions itself fails here.
* **Values.** Log-probs must be those of plain rows, up to rounding. In fp32 rounding is small. In 16 bits it depends
  on the model: SmolLM2 in bf16 is 2.9 nats away from itself in fp32 on arbitrary tokens. The tokens are therefore ones
  that the model itself finds likely, and the tolerance is a multiple of what noise of one rounding a layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpo_lightning.core.errors import one_line
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow

# Largest difference of log-probs that is rounding, by dtype.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_AGREEMENT = 0.2
# In 16 bits: so many times what noise of one rounding a layer does, and never more than this.
_ROUNDINGS, _COARSEST_AGREEMENT = 4.0, 2.0
# One rounding of 8-bit products, relative.
_EIGHT_BIT_ROUNDING = 2.0**-7
_CONTEXT, _FIRST, _SECOND = (3, 5, 4), (6, 7), (8, 9)
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)

Ids = Sequence[int]


def failure_of_shared_rows(model: Any, full_logits: bool) -> str | None:
    """Why members of a group cannot share a row of this model; ``None`` if they can.

    The model must have the attention of ``attention.py``.
    """
    for prefix_gradient in (True, False):
        try:
            with trying(model):
                failure = (
                    _mixing(model, full_logits, prefix_gradient)
                    or (_wrong_positions(model, full_logits) if prefix_gradient else None)
                    or _wrong_values(model, full_logits, prefix_gradient)
                )
        except _ERRORS as error:
            return f"a trial failed: {one_line(error)}"
        if failure is not None:
            return failure
    return None


@contextmanager
def trying(model: Any) -> Iterator[None]:
    """The model in evaluation mode, without gradient, without autocast, and without outliers of 8-bit products."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # LLM.int8 decides by all tokens of a pass which columns it computes in 16 bits; without them a token is on its own.
    states = [m.state for m in model.modules() if hasattr(getattr(m, "state", None), "threshold")]
    thresholds = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        # Lightning builds models under a default device that may differ from the model's.
        with torch.no_grad(), device, torch.autocast(device.type, enabled=False):
            yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
        model.train(was_training)


def logprobs_of(
    model: Any, context: Ids, suffixes: Sequence[Ids], shared: bool, full_logits: bool, prefix_gradient: bool = True
) -> Tensor:
    """Log-probs of the tokens of suffixes, in a shared row or in plain rows, [members, tokens]."""
    size = model.config.get_text_config().vocab_size
    ids = tuple(i % size for i in context)
    rows = [Row(0, i, ids, tuple(j % size for j in s), len(s)) for i, s in enumerate(suffixes)]
    batch = [SharedRow(tuple(rows))] if shared else [SharedRow((row,)) for row in rows]
    device = next(model.parameters()).device
    return token_logprobs(model, batch, 1.0, 0, device, full_logits, prefix_gradient).logprobs_BS


def _mixing(model: Any, full_logits: bool, prefix_gradient: bool) -> str | None:
    def shared(context: Ids, first: Ids, second: Ids) -> Tensor:
        return logprobs_of(model, context, (first, second), True, full_logits, prefix_gradient)

    base = shared(_CONTEXT, _FIRST, _SECOND)
    for changed, kept in ((shared(_CONTEXT, _FIRST, _SECOND[::-1]), 0), (shared(_CONTEXT, _FIRST[::-1], _SECOND), 1)):
        if not torch.equal(changed[kept], base[kept]):
            apart = float((changed[kept] - base[kept]).abs().max())
            return f"recurrent layers? another member's tokens change its log-probs by {apart:.2g}"
    other = shared((*_CONTEXT[:2], _CONTEXT[1]), _FIRST, _SECOND)
    if not bool((other != base).any(dim=1).all()):
        return "a member does not see the last token of its context"
    return None


def _wrong_positions(model: Any, full_logits: bool) -> str | None:
    def moved(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs["position_ids"].clone()
        positions[:, len(_CONTEXT) : len(_CONTEXT) + len(_FIRST)] += 2
        return args, {**kwargs, "position_ids": positions}

    suffixes = (_FIRST, _SECOND)
    base = logprobs_of(model, _CONTEXT, suffixes, True, full_logits)
    hook = model.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        found = logprobs_of(model, _CONTEXT, suffixes, True, full_logits)
    finally:
        hook.remove()
    if not torch.equal(found[1], base[1]):
        return "a member's positions change another's log-probs"
    if torch.equal(found[0], base[0]) and not _is_precise(model):
        return "it does not take the positions that it is given"
    return None


def _wrong_values(model: Any, full_logits: bool, prefix_gradient: bool) -> str | None:
    context, suffixes = (_CONTEXT, (_FIRST, _SECOND)) if _is_precise(model) else likely_tokens(model)

    def plain() -> Tensor:
        return logprobs_of(model, context, suffixes, False, full_logits)

    alone = plain()
    together = logprobs_of(model, context, suffixes, True, full_logits, prefix_gradient)
    if agree(model, alone, together, rounding(model, plain)):
        return None
    return f"recurrent layers? log-probs of a trial differ by {(alone - together).abs().max():.2g}"


def likely_tokens(model: Any, context: Ids = _CONTEXT) -> tuple[list[int], list[list[int]]]:
    """A context and two suffixes of two tokens that the model itself finds likely after a few given tokens."""
    device, size = next(model.parameters()).device, model.config.get_text_config().vocab_size

    def best(ids: Ids, count: int = 1) -> list[int]:
        logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1]
        found: list[int] = logits.topk(count).indices.tolist()
        return found

    ids = [i % size for i in context]
    for _ in range(3):
        ids += best(ids)
    return ids, [[token, *best([*ids, token])] for token in best(ids, 2)]


def rounding(model: Any, compute: Callable[[], Tensor]) -> float:
    """What noise of one rounding before every layer does to log-probs; 0 where rounding is small anyway."""
    if _is_precise(model):
        return 0.0
    relative = max(
        _EIGHT_BIT_ROUNDING if _has_eight_bits(model) else 0.0,
        *(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()),
    )
    if next(model.parameters()).device.type == "cuda":
        relative = max(relative, 2.0**-10)  # TF32
    # A generator of the CPU, so that the trial is the same on every device.
    generator = torch.Generator().manual_seed(0)

    def disturb(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        noise = 1 + relative * (2 * torch.rand(hidden.shape, generator=generator) - 1)
        hidden = hidden * noise.to(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[nn.Module] = [m for m in model.modules() if type(m).__name__ in names]
    before = compute()
    hooks = [layer.register_forward_pre_hook(disturb, with_kwargs=True) for layer in layers]
    try:
        return max(float((compute() - before).abs().max()) for _ in range(3))
    finally:
        for hook in hooks:
            hook.remove()


def agree(model: Any, first: Tensor, second: Tensor, noise: float = 0.0) -> bool:
    """Whether log-probs are equal up to rounding.

    Args:
        model: The policy; its coarsest parameters decide.
        first: Log-probs.
        second: The same, computed otherwise.
        noise: See ``rounding``.
    """
    if _is_precise(model):
        tolerance = max(_AGREEMENT[p.dtype] for p in model.parameters())
    else:
        tolerance = max(_COARSE_AGREEMENT, min(_ROUNDINGS * noise, _COARSEST_AGREEMENT))
    return first.shape == second.shape and bool((first - second).abs().max() < tolerance)


def _is_precise(model: Any) -> bool:
    """Whether the model computes in fp32 or better throughout; quantised weights compute in 16 bits."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    if on_gpu and torch.get_float32_matmul_precision() != "highest":
        return False
    return all(p.dtype in _AGREEMENT for p in model.parameters())


def _has_eight_bits(model: Any) -> bool:
    return any(p.dtype == torch.int8 for p in model.parameters())
