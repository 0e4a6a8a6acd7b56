"""Keys and values of the sequences that ``TransformersEngine`` decodes.

Members of a group continue the same prompt and prefix, their *context*. Where the policy has been shown to keep the
members of a shared row apart (``model_support``), a context stays where it was computed, one for a group: a step reads
it once instead of once for every member, which is most of decoding where prefixes are long. Elsewhere, and where
there is little to share, every sequence has a copy of its context.

Shape suffixes are those of ``records``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rpo_lightning.policy.prefix_sharing.attention import same_dtype
from rpo_lightning.policy.prefix_sharing.compatibility import agree
from rpo_lightning.rollout.transformers.attention import SharedContexts
from rpo_lightning.rollout.transformers.growing_cache import GrowingLayer, growing_cache, select_sequences

log = logging.getLogger(__name__)

# Attention in two parts takes about as long on a CPU as reading this many bytes of copies in a layer: of 1.6 and 2.0 MB
# (a reasoner of 3 layers, SmolLM2-135M) copies and parts were equally fast, on one and on two threads.
_BYTES_WORTH_SHARING = 2 * 10**6


class SequenceCache(ABC):
    """What the policy has to know of the tokens so far."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Arguments of the policy's next forward pass, which takes one token of each sequence."""

    @abstractmethod
    def keep(self, indices: Tensor) -> None:
        """Drop all sequences but these."""


class CopiedContexts(SequenceCache):
    """Every sequence has keys and values of all its tokens.

    Args:
        cache: Of the requests; taken over.
        mask_RT: Zero where a request is padded.
        owner_N: The request of each sequence.
        longest: Tokens that a sequence may get.
    """

    def __init__(self, cache: DynamicCache, mask_RT: Tensor, owner_N: Tensor, longest: int) -> None:
        select_sequences(cache, owner_N)
        self._cache = cache
        # Room for the whole suffix, so that the mask is sliced instead of concatenated at every step.
        self._mask_NT = torch.cat([mask_RT[owner_N], mask_RT.new_ones(len(owner_N), longest)], dim=1)

    def inputs(self) -> dict[str, Any]:
        """Keys, values and mask of whole sequences."""
        return {
            "past_key_values": self._cache,
            "attention_mask": self._mask_NT[:, : self._cache.get_seq_length() + 1],
        }

    def keep(self, indices: Tensor) -> None:
        """Drop sequences and their copies."""
        select_sequences(self._cache, indices)
        self._mask_NT = self._mask_NT[indices]


class OneContextEach(SequenceCache):
    """Requests have keys and values of their context, sequences those of their own tokens.

    Args:
        policy: The model.
        cache: Of the requests; taken over.
        mask_RT: Zero where a request is padded.
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
        """Whether contexts may be shared, and whether that is worth it: always on a GPU, where it was not measured.

        Args:
            cache: Of the requests. All of its layers must keep every token (not so recurrent ones and sliding windows).
            copies: Of contexts that it saves: sequences without requests.
        """
        layers = cast(list[GrowingLayer], cache.layers)
        if copies == 0 or not all(type(layer) is GrowingLayer for layer in layers):
            return False
        key, value = cast(Tensor, layers[0].keys), cast(Tensor, layers[0].values)
        copied_bytes = (key[0].nbytes + value[0].nbytes) * copies
        return key.device.type != "cpu" or copied_bytes >= _BYTES_WORTH_SHARING

    def inputs(self) -> dict[str, Any]:
        """The mask is that of the contexts: sequences see all tokens of their own."""
        return {
            "past_key_values": self._own,
            "attention_mask": self._mask_R11T,
            "shared_contexts": self._contexts,
        }

    def keep(self, indices: Tensor) -> None:
        """Drop sequences, and each context with the last of its sequences."""
        select_sequences(self._own, indices)
        slot_N = self._slot_N[indices]
        live_R, owner_N = (slot_N // self._members).unique(return_inverse=True)
        del self._contexts  # lest all of the old ones live until the last of the new ones is made
        if len(live_R) < len(self._mask_R11T):
            select_sequences(self._cache, live_R)
            self._mask_R11T = self._mask_R11T[live_R]
        self._slot_N = owner_N * self._members + slot_N % self._members
        self._contexts = self._shared()

    def _shared(self) -> SharedContexts:
        """The contexts as attention takes them."""
        layers = cast(list[GrowingLayer], self._cache.layers)
        every_place = len(self._slot_N) == len(self._mask_R11T) * self._members
        return SharedContexts(
            [same_dtype(cast(Tensor, x.keys), cast(Tensor, x.values)) for x in layers],
            self._mask_R11T,
            self._members,
            None if every_place else self._slot_N,
        )


def contexts_can_be_shared(policy: PreTrainedModel) -> bool:
    """Decode a few tokens both ways: some models change keys and values once they are cached.

    The update's trial (``model_support``) does not see that. Autocast is off: the tolerance is that of the policy's own
    precision.
    """
    with torch.autocast(policy.device.type, enabled=False):
        try:
            if agree(policy, *(_tried(policy, shares) for shares in (False, True))):
                return True
            reason = "computes something else"
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"fails ({error})"
    log.warning(
        f"{type(policy).__name__} {reason} where sequences share a prompt's keys: each decodes with its own copy"
    )
    return False


def _tried(policy: PreTrainedModel, shares: bool) -> Tensor:
    """Log-probs after two tokens of three sequences, which continue two prompts."""
    size, device = policy.config.get_text_config().vocab_size, policy.device
    mask_RT = torch.tensor([[0, 1, 1], [1, 1, 1]], device=device)
    contexts_RT = torch.tensor([[0, 3, 5], [4, 6, 7]], device=device) % size
    owner_N = torch.tensor([0, 0, 1], device=device)
    positions_RT = (mask_RT.cumsum(-1) - 1).clamp(min=0)
    cache = growing_cache(policy.config)
    policy(contexts_RT, attention_mask=mask_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True)
    sequences: SequenceCache
    if shares:
        sequences = OneContextEach(policy, cache, mask_RT, owner_N)
    else:
        sequences = CopiedContexts(cache, mask_RT, owner_N, longest=2)
    for step, ids in enumerate(([8, 9, 3], [5, 4, 8])):
        ids_N1 = torch.tensor(ids, device=device)[:, None] % size
        positions_N1 = (mask_RT.sum(-1)[owner_N] + step)[:, None]
        output = policy(ids_N1, position_ids=positions_N1, use_cache=True, **sequences.inputs())
    return output.logits[:, -1].float().log_softmax(-1)
