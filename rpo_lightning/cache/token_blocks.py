"""Token ids of numbered responses in a few large arrays (blocks).

A million responses take little more memory than their token ids. A new response is appended to the newest block. A
replaced response's old tokens stay in their block as dead tokens. When dead tokens exceed a sixteenth of the live ones
(plus one small block), the block with the most dead tokens is dropped, and its live responses are appended again.

Written tokens are never overwritten, so views and states that were handed out never change. They keep a dropped block
alive as long as they need it. A replacement copies, on average, a bounded multiple of its own tokens, regardless of the
number of responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import numpy as np
import torch

from rpo_lightning.cache.soundness import array_of
from rpo_lightning.core.errors import CacheError

# A new block has room for a 32nd of the live tokens, between 0.25 and 64 MiB. This bounds the unused end of the newest
# block, and the pause while a block is dropped.
LIVE_TOKENS_PER_BLOCK_TOKEN = 32
SMALLEST_BLOCK, LARGEST_BLOCK = 2**16, 2**24
# Dead tokens may make up a 16th of the live ones plus the smallest block.
LIVE_TOKENS_PER_DEAD_TOKEN = 16

_NOWHERE = -1
_PLACE = np.dtype([("block", np.int32), ("start", np.int64), ("length", np.int64)])


def _own_pages(count: int) -> np.ndarray:
    """Memory for ``count`` tokens straight from the system.

    It takes no memory until it is written to, and the system gets it back as soon as it is freed. The allocator would
    keep freed blocks: as much as a third of the tokens' bytes.
    """
    size = max(count, 1) * np.dtype(np.int32).itemsize
    return np.frombuffer(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.int32)


@dataclass(slots=True)
class _Block:
    tokens: np.ndarray
    filled: int = 0
    live: int = 0


class TokenBlocks:
    """Token ids by number. Use numbers 0, 1, 2, … without large gaps: memory grows with the largest."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._newest = _NOWHERE  # the block that responses are appended to
        self._next_block = 0
        self._places = np.zeros(0, _PLACE)
        self._known = 0
        self._held = 0
        self.live_tokens = 0
        self.stored_tokens = 0

    def __len__(self) -> int:
        """How many numbers have tokens."""
        return self._held

    def __contains__(self, number: int) -> bool:
        return number < self._known and bool(self._places["block"][number] != _NOWHERE)

    def __getitem__(self, number: int) -> np.ndarray:
        """The tokens of a number: a read-only view that never changes."""
        block, start, length = self._places[number].item()
        view = self._blocks[block].tokens[start : start + length]
        view.flags.writeable = False
        return view

    def __setitem__(self, number: int, token_ids: np.ndarray) -> None:
        token_ids = np.asarray(token_ids, np.int32)
        self._know(number)
        block, _, length = self._places[number].item()
        if block == _NOWHERE:
            self._held += 1
        else:
            self._blocks[block].live -= length
            self.live_tokens -= length
        self._write(number, token_ids)
        self.live_tokens += len(token_ids)
        while self._dead() > self.live_tokens // LIVE_TOKENS_PER_DEAD_TOKEN + SMALLEST_BLOCK:
            self._drop_deadest_block()

    def lengths(self, count: int) -> np.ndarray:
        """Lengths in tokens of the numbers below ``count``, [count]; -1 for a number without tokens."""
        lengths = np.full(count, -1, np.int64)
        places = self._places[: min(count, self._known)]
        lengths[: len(places)] = np.where(places["block"] == _NOWHERE, -1, places["length"])
        return lengths

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The blocks, without a copy, and the position of each number's tokens in them."""
        places = self._places[: self._known]
        return {
            "blocks": {number: torch.from_numpy(b.tokens[: b.filled]) for number, b in self._blocks.items()},
            **{name: torch.from_numpy(places[name].copy()) for name in _PLACE.names or ()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any], most: int | None = None, vocabulary_size: int | None = None
    ) -> None:
        """Share the blocks of a state without a copy. None of them is written to.

        Args:
            state: What ``state_dict`` returned.
            most: How many numbers there can be; ``None`` for any.
            vocabulary_size: Token ids lie below it; ``None`` if that is not known.

        Raises:
            CacheError: A position lies outside its block.
            ValueError: A part cannot be one.
        """
        arrays = {int(n): array_of(tokens, np.int32, (None,)) for n, tokens in state["blocks"].items()}
        blocks = {number: _Block(tokens, len(tokens)) for number, tokens in arrays.items()}
        highest = max((int(tokens.max(initial=0)) for tokens in arrays.values()), default=0)
        if min((int(tokens.min(initial=0)) for tokens in arrays.values()), default=0) < 0:
            raise ValueError("a token id is negative")
        if vocabulary_size is not None and highest >= vocabulary_size:
            raise ValueError(f"token id {highest} is outside the policy's vocabulary of {vocabulary_size}")
        if most is not None and len(state["block"]) > most:
            raise ValueError("it has more responses than questions")
        places = np.zeros(len(state["block"]), _PLACE)
        for name in _PLACE.names or ():
            places[name] = array_of(state[name], _PLACE[name].type, (len(places),))
        there = places[places["block"] != _NOWHERE]
        numbers, index = np.unique(there["block"], return_inverse=True)
        ends = np.zeros(len(numbers), np.float64)  # which does not overflow, whatever a state says
        np.maximum.at(ends, index, there["start"].astype(np.float64) + there["length"])
        live = np.zeros(len(numbers), np.int64)
        np.add.at(live, index, there["length"])
        if min(there["start"].min(initial=0), there["length"].min(initial=0)) < 0:
            raise CacheError("the checkpoint's cache is damaged (negative positions): resume from another checkpoint")
        for number, end, count in zip(numbers.tolist(), ends.tolist(), live.tolist(), strict=True):
            if number not in blocks or end > blocks[number].filled:
                raise CacheError(
                    f"the checkpoint's cache is damaged (tokens missing in block {number}): resume from another "
                    "checkpoint"
                )
            blocks[number].live = count
        self._blocks, self._places, self._known = blocks, places, len(places)
        self._held = len(there)
        self._newest, self._next_block = _NOWHERE, max(blocks, default=-1) + 1
        self.live_tokens = int(there["length"].sum())
        self.stored_tokens = sum(b.filled for b in blocks.values())

    # -- blocks ---------------------------------------------------------------------------------

    def _dead(self) -> int:
        return self.stored_tokens - self.live_tokens

    def _know(self, number: int) -> None:
        """Make room for a number. Doubling makes this cheap on average."""
        if number >= len(self._places):
            places = np.zeros(max(2 * len(self._places), number + 1, 1024), _PLACE)
            places["block"] = _NOWHERE
            places[: self._known] = self._places[: self._known]
            self._places = places
        self._known = max(self._known, number + 1)

    def _write(self, number: int, token_ids: np.ndarray) -> None:
        count = len(token_ids)
        block = self._blocks.get(self._newest)
        if block is None or block.filled + count > len(block.tokens):
            size = min(max(self.live_tokens // LIVE_TOKENS_PER_BLOCK_TOKEN, SMALLEST_BLOCK), LARGEST_BLOCK)
            block = _Block(_own_pages(max(size, count)))
            self._newest = self._next_block
            self._blocks[self._newest] = block
            self._next_block += 1
        start = block.filled
        block.tokens[start : start + count] = token_ids
        block.filled += count
        block.live += count
        self.stored_tokens += count
        self._places[number] = (self._newest, start, count)

    def _drop_deadest_block(self) -> None:
        dropped = max(self._blocks, key=lambda n: self._blocks[n].filled - self._blocks[n].live)
        if dropped == self._newest:
            self._newest = _NOWHERE
        block = self._blocks.pop(dropped)
        self.stored_tokens -= block.filled
        places = self._places[: self._known]
        for number in np.flatnonzero(places["block"] == dropped).tolist():
            _, start, length = places[number].item()
            self._write(number, block.tokens[start : start + length])
