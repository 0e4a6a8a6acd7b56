"""Keys and values of the sequences that ``TransformersEngine`` decodes.

Members of a group continue the same context. If the policy passed the trial of shared rows
(``policy/prefix_sharing/compatibility.py``), a group has one copy of its context, and a step reads it once for all
members. With long prefixes reading contexts is most of decoding. For other policies, and for small contexts, every
sequence has a copy of its context.

Shape suffixes are those of ``core/types.py``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from rpo_lightning.core.errors import one_line
from rpo_lightning.policy.prefix_sharing.attention import same_dtype
from rpo_lightning.policy.prefix_sharing.trial import agree, likely_tokens, rounding, trying
from rpo_lightning.rollout.transformers.attention import SharedContexts
from rpo_lightning.rollout.transformers.growing_cache import GrowingLayer, growing_cache, select_sequences

log = logging.getLogger(__name__)

# On a CPU, attention in two parts takes as long as reading this many bytes of copied contexts in a layer. Both were
# equally fast at 1.6 MB (a reasoner of 3 layers) and 2.0 MB (SmolLM2-135M), on one and two threads.
_BYTES_WORTH_SHARING = 2 * 10**6


class SequenceCache(ABC):
    """The state of decoding: keys, values and masks of the tokens so far."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Arguments for the policy's next forward pass, with one token of each sequence."""

    @abstractmethod
    def keep(self, indices: Tensor) -> None:
        """Drop all sequences except these.

        Args:
            indices: Indices of the sequences that stay.
        """


class CopiedContexts(SequenceCache):
    """Every sequence has keys and values of all its tokens, context included.

    Args:
        cache: Keys and values of the requests; changed in place.
        mask_RT: 0 where a request is padded, 1 elsewhere.
        owner_N: The request of each sequence.
        longest: Most tokens that a sequence may get.
    """

    def __init__(self, cache: DynamicCache, mask_RT: Tensor, owner_N: Tensor, longest: int) -> None:
        select_sequences(cache, owner_N)
        self._cache = cache
        # Room for the whole suffix: each step slices the mask and concatenates nothing.
        self._mask_NT = torch.cat([mask_RT[owner_N], mask_RT.new_ones(len(owner_N), longest)], dim=1)

    @override
    def inputs(self) -> dict[str, Any]:
        return {
            "past_key_values": self._cache,
            "attention_mask": self._mask_NT[:, : self._cache.get_seq_length() + 1],
        }

    @override
    def keep(self, indices: Tensor) -> None:
        select_sequences(self._cache, indices)
        self._mask_NT = self._mask_NT[indices]


class OneContextEach(SequenceCache):
    """A request has keys and values of the context, each sequence those of its own tokens.

    Args:
        policy: The model.
        cache: Keys and values of the requests; changed in place.
        mask_RT: 0 where a request is padded, 1 elsewhere.
        owner_N: The request of each sequence, in ascending order.
    """

    def __init__(self, policy: PreTrainedModel, cache: DynamicCache, mask_RT: Tensor, owner_N: Tensor) -> None:
        counts_R = torch.bincount(owner_N, minlength=len(mask_RT))
        first_R = counts_R.cumsum(0) - counts_R
        self._members = int(counts_R.max())
        self._slot_N = owner_N * self._members + torch.arange(len(owner_N), device=owner_N.device) - first_R[owner_N]
        self._cache = cache
        hidden_RT = torch.zeros(mask_RT.shape, device=mask_RT.device).masked_fill(mask_RT == 0, float("-inf"))
        self._mask_R11T = hidden_RT[:, None, None]
        self._own = growing_cache(policy.config)
        self._contexts = self._shared()

    @staticmethod
    def pays(cache: DynamicCache, copies: int) -> bool:
        """Whether this class is possible for a cache, and faster than copies.

        It is possible if every layer stores all tokens; recurrent layers and sliding windows do not. On a GPU it counts
        as faster in any case, which is not measured.

        Args:
            cache: Keys and values of the requests.
            copies: Number of context copies that it saves: sequences minus requests.
        """
        layers = cast(list[GrowingLayer], cache.layers)
        if copies == 0 or not all(type(layer) is GrowingLayer for layer in layers):
            return False
        key, value = cast(Tensor, layers[0].keys), cast(Tensor, layers[0].values)
        copied_bytes = (key[0].nbytes + value[0].nbytes) * copies
        return key.device.type != "cpu" or copied_bytes >= _BYTES_WORTH_SHARING

    @override
    def inputs(self) -> dict[str, Any]:
        """See ``SequenceCache.inputs``. The mask is for contexts; a sequence sees all of its own tokens."""
        return {
            "past_key_values": self._own,
            "attention_mask": self._mask_R11T,
            "shared_contexts": self._contexts,
        }

    @override
    def keep(self, indices: Tensor) -> None:
        """Drop all sequences except these, and contexts without a sequence."""
        select_sequences(self._own, indices)
        slot_N = self._slot_N[indices]
        live_R, owner_N = (slot_N // self._members).unique(return_inverse=True)
        del self._contexts  # frees old contexts before the new ones are made
        if len(live_R) < len(self._mask_R11T):
            select_sequences(self._cache, live_R)
            self._mask_R11T = self._mask_R11T[live_R]
        self._slot_N = owner_N * self._members + slot_N % self._members
        self._contexts = self._shared()

    def _shared(self) -> SharedContexts:
        """The contexts, as decoding attention takes them."""
        layers = cast(list[GrowingLayer], self._cache.layers)
        every_place = len(self._slot_N) == len(self._mask_R11T) * self._members
        return SharedContexts(
            [same_dtype(cast(Tensor, x.keys), cast(Tensor, x.values)) for x in layers],
            self._mask_R11T,
            self._members,
            None if every_place else self._slot_N,
        )


def contexts_can_be_shared(policy: PreTrainedModel) -> bool:
    """Whether sequences may share a context in decoding; tried on a few tokens. Logs a warning if the answer is no.

    As in ``policy/prefix_sharing/trial.py``: tokens of another sequence must leave a sequence's log-probs as they are,
    bit for bit, and the log-probs must be those of decoding with copies, up to rounding. Some models change keys and
    values after caching them, which a trial of shared rows does not show.
    """
    try:
        with trying(policy):
            reason = _failure_of_shared_contexts(policy)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"fails ({one_line(error)})"
    if reason is not None:
        log.warning(f"{type(policy).__name__} {reason} if sequences share a context: each decodes with its own copy")
    return reason is None


def _failure_of_shared_contexts(policy: PreTrainedModel) -> str | None:
    context, (first, second) = likely_tokens(policy)
    contexts, decoded = (context, context[::-1]), (first, second, first)
    shared = _decoded(policy, True, contexts, decoded)
    for changed, same in (
        (_decoded(policy, True, contexts, (first, second[::-1], first)), [0, 2]),
        (_decoded(policy, True, (context, [*context[:-1], context[0]]), decoded), [0, 1]),
    ):
        if not torch.equal(changed[same], shared[same]):
            return "mixes sequences"

    likely_NK = shared.topk(4).indices

    def copied() -> Tensor:
        return _decoded(policy, False, contexts, decoded).gather(1, likely_NK)

    if not agree(policy, copied(), shared.gather(1, likely_NK), rounding(policy, copied)):
        return "gives other log-probs"
    return None


def _decoded(
    policy: PreTrainedModel, shares: bool, contexts: Sequence[list[int]], decoded: Sequence[list[int]]
) -> Tensor:
    """Log-probs after two decoded tokens of three sequences, [3, V]; the first two have the first of two contexts."""
    device = policy.device
    contexts_RT = torch.tensor([[0, *contexts[0][1:]], contexts[1]], device=device)
    mask_RT = torch.ones_like(contexts_RT)
    mask_RT[0, 0] = 0  # contexts have different lengths
    owner_N = torch.tensor([0, 0, 1], device=device)
    positions_RT = (mask_RT.cumsum(-1) - 1).clamp(min=0)
    cache = growing_cache(policy.config)
    policy(contexts_RT, attention_mask=mask_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True)
    sequences: SequenceCache
    if shares:
        sequences = OneContextEach(policy, cache, mask_RT, owner_N)
    else:
        sequences = CopiedContexts(cache, mask_RT, owner_N, longest=2)
    for step in range(2):
        ids_N1 = torch.tensor([[tokens[step]] for tokens in decoded], device=device)
        positions_N1 = (mask_RT.sum(-1)[owner_N] + step)[:, None]
        output = policy(ids_N1, position_ids=positions_N1, use_cache=True, **sequences.inputs())
    return output.logits[:, -1].float().log_softmax(-1)
