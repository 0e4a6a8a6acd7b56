"""Finds out whether a model allows shared rows, and scoring inside its output head.

A model's configuration does not say what the model does with its attention (recurrent layers have none) or to its
logits (caps, scales). Both are therefore tried once, on a few tokens, and compared with plain rows and full logits. A
few tokens cannot show windows, chunks, caps and dropout; these are read from the configuration.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from rpo_lightning.policy.limits import head_size
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION
from rpo_lightning.policy.prefix_sharing.rows import RowCost
from rpo_lightning.policy.prefix_sharing.trial import (
    agree,
    failure_of_shared_rows,
    likely_tokens,
    logprobs_of,
    trying,
)

log = logging.getLogger(__name__)

# Layers whose attention is full up to a known length. Sparse and indexed layers may look full on a few tokens.
_FULL_UP_TO_A_LENGTH = {"full_attention", "sliding_attention", "chunked_attention"}
# Settings of models that call a dropout function instead of a module.
_DROPOUTS = ("attention_dropout", "activation_dropout", "dropout")
# Attention kernels reach about half the rate of matrix products (measured by benchmarks/update_phase.py on a CPU).
_ATTENTION_SLOWDOWN = 2.0
# Cost of gathering and merging one hidden-state element of a suffix, in operations of a matrix product. The same script
# measured it on the embedded reasoner: a fifth of a token's cost there, almost nothing from 100M parameters on.
_BRANCH_OPERATIONS = 200.0


def needs_full_logits(model: Any) -> bool:
    """Whether the model changes logits after its output head; scoring inside the head is wrong then. Logs a warning."""
    # A cap is read from the configuration: the logits of a trial may be too small to show it.
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is None:
        with trying(model):
            context, suffixes = likely_tokens(model)
            exact, scored = (logprobs_of(model, context, suffixes, False, full) for full in (True, False))
        if agree(model, exact, scored):
            return False
    log.warning(
        f"{type(model).__name__} changes its logits after the output head: log-probs are computed from the logits of "
        "whole rows, which takes more memory"
    )
    return True


def row_cost(model: Any, shares: bool, full_logits: bool) -> RowCost:
    """Cost of rows for this model, and whether members of a group may share one. Logs why not.

    Args:
        model: The policy.
        shares: Whether sharing is wanted (``model.update.share_prefixes``).
        full_logits: See ``needs_full_logits``.
    """
    longest = _longest_short_sequence(model.config.get_text_config())
    if not shares:
        return RowCost(shares=False, longest_shared=longest)
    obstacle = sharing_obstacle(model, full_logits)
    if obstacle is not None:
        log.warning(f"{obstacle}: every response gets a row of its own, and its prefix is computed again in each")
        return RowCost(shares=False, longest_shared=longest)
    if longest is not None:
        log.warning(
            f"{type(model).__name__} treats long sequences differently (sliding window, chunks or rotary embeddings): "
            f"only sequences of at most {longest} tokens share rows"
        )
    attention, branch = _costs(model)
    return RowCost(attention=attention, branch=branch, longest_shared=longest)


def sharing_obstacle(model: Any, full_logits: bool = False) -> str | None:
    """Why members of a group cannot share a row of this model; ``None`` if they can."""
    if model.config._attn_implementation not in ("sdpa", IMPLEMENTATION):
        return f"attention is {model.config._attn_implementation!r}, shared rows need 'sdpa'"
    config = model.config.get_text_config()
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    if any(p for p in dropouts + [getattr(config, name, None) for name in _DROPOUTS]):
        return f"{type(model).__name__} trains with dropout, and members would share that of their context"
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", [])):
        return f"{type(model).__name__} scales its queries by their position in a row (attn_temperature_tuning)"
    others = set(getattr(config, "layer_types", None) or ()) - _FULL_UP_TO_A_LENGTH
    if others:
        return f"{type(model).__name__} has layers of {', '.join(sorted(others))}, which do not support shared rows"
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        return f"{type(model).__name__} does not let its attention be replaced"
    failure = failure_of_shared_rows(model, full_logits)
    if failure is not None:
        model.set_attn_implementation("sdpa")
        return f"{type(model).__name__} does not keep the members of a shared row apart ({failure})"
    return None


def _longest_short_sequence(config: Any) -> int | None:
    """Longest sequence without effect of windows, chunks and long rotary embeddings; ``None`` if there is no limit."""
    layers = getattr(config, "layer_types", None)
    limits = []
    if getattr(config, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers):
        limits.append(getattr(config, "sliding_window", None))
    if layers is None or "chunked_attention" in layers:
        limits.append(getattr(config, "attention_chunk_size", None))
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "longrope":  # the longest row of a pass decides for all its rows
        limits.append(rotary.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return min((int(limit) for limit in limits if limit is not None), default=None)


def _costs(model: Any) -> tuple[float, float]:
    """Costs of a query–key pair and of a suffix token in a shared row, where a token's matrix products cost 1."""
    config = model.config.get_text_config()
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_size(config)
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in embeddings)
    branch = _BRANCH_OPERATIONS * config.num_hidden_layers * config.hidden_size
    return _ATTENTION_SLOWDOWN * pair / (2 * max(matrices, 1)), branch / max(matrices, 1)
