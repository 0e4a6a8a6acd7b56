"""A key–value cache that grows in blocks and writes new tokens in place.

transformers' ``DynamicCache`` copies all keys and values at every step. Over a long suffix that is quadratic, and on a
CPU it is the larger part of decoding. The layers here have spare room. Under autocast, rotary embeddings return keys in
fp32, and attention casts them at every read; here they are cast once, when they are written.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer with spare room for ``block`` more tokens at a time."""

    def __init__(self, block: int = 128) -> None:
        super().__init__()
        self._block = block
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of shape [N, heads, tokens, head_dim] and return all of them, in the values' dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < needed:
            self._grow(key_states, value_states, used, needed + self._block)
        assert self._room is not None
        keys, values = self._room
        keys[:, :, used:needed] = key_states
        values[:, :, used:needed] = value_states
        self.keys, self.values = keys[:, :, :needed], values[:, :, :needed]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select, repeat or reorder sequences.

        Args:
            beam_idx: Index of the old sequence for each new one.
        """
        used = self.get_seq_length()
        if self._room is None or used == 0:
            return
        keys, values = self._room
        self._room = (keys[beam_idx], values[beam_idx])
        self.keys, self.values = self._room[0][:, :, :used], self._room[1][:, :, :used]

    def _grow(self, key_states: Tensor, value_states: Tensor, used: int, capacity: int) -> None:
        rooms = []
        for new, old in ((key_states, self.keys), (value_states, self.values)):
            room = value_states.new_empty(*new.shape[:2], capacity, new.shape[-1])
            if used:
                room[:, :, :used] = cast(Tensor, old)
            rooms.append(room)
        self._room = (rooms[0], rooms[1])


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A ``DynamicCache`` for a model, with a ``GrowingLayer`` for each layer of full attention."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_sequences(cache: DynamicCache, indices: Tensor) -> None:
    """Select, repeat or reorder the sequences of a cache in place. Works for all layers, recurrent ones included."""
    with torch.no_grad():
        cache.reorder_cache(cast(torch.LongTensor, indices))
