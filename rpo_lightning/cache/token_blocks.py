"""Token ids of numbered responses in a few large arrays, so that a million of them cost little more than their bytes.

Responses are written one after the other into blocks and never changed there; a response that is replaced
is written anew, at the end of the newest block. Its old tokens are dead. Once more than a sixteenth of what
is stored is, the block with the most dead tokens is given up: what lives in it is written anew, and the block is left
to whoever still looks at it. Since nothing is ever overwritten, views that were handed out and states that were
taken never change.

Every replacement costs, on average, the copy of a bounded multiple of its own tokens, whatever the number of responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import numpy as np
import torch

from rpo_lightning.core.errors import CacheError

# A block holds a 32nd of what lives when it is begun, between 0.25 and 64 MiB: the unused end of the newest block and
# the pause in which one is given up stay small whatever the size of the whole.
LIVE_TOKENS_PER_BLOCK_TOKEN = 32
SMALLEST_BLOCK, LARGEST_BLOCK = 2**16, 2**24
# Dead tokens that are put up with: a share of the living ones, and a small block's worth.
LIVE_TOKENS_PER_DEAD_TOKEN = 16

_NOWHERE = -1
_PLACE = np.dtype([("block", np.int32), ("start", np.int64), ("length", np.int64)])


def _own_pages(count: int) -> np.ndarray:
    """Room for tokens straight from the system, which takes nothing until it is written to and goes back at once.

    Blocks from the allocator stay with the process once they are given up: a third of the tokens' bytes was seen to.
    """
    size = max(count, 1) * np.dtype(np.int32).itemsize
    return np.frombuffer(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.int32)


@dataclass(slots=True)
class _Block:
    tokens: np.ndarray
    filled: int = 0
    live: int = 0


class TokenBlocks:
    """Token ids by the number of their owner; numbers are 0, 1, 2, … without large gaps."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._newest = _NOWHERE  # the block that is written to
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
        """The tokens of a number: a view that nobody may write to, and that never changes."""
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
            self._give_up_deadest()

    def lengths(self, count: int) -> np.ndarray:
        """Number of tokens of the numbers below ``count``, -1 for those that have none."""
        lengths = np.full(count, -1, np.int64)
        places = self._places[: min(count, self._known)]
        lengths[: len(places)] = np.where(places["block"] == _NOWHERE, -1, places["length"])
        return lengths

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The blocks without a copy, and where in them every number's tokens are."""
        places = self._places[: self._known]
        return {
            "blocks": {number: torch.from_numpy(b.tokens[: b.filled]) for number, b in self._blocks.items()},
            **{name: torch.from_numpy(places[name].copy()) for name in _PLACE.names or ()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the blocks of a state, without a copy; none of them is written to.

        Raises:
            CacheError: Tokens are said to be where none are.
        """
        blocks = {int(n): _Block(tokens.numpy(), len(tokens)) for n, tokens in state["blocks"].items()}
        places = np.zeros(len(state["block"]), _PLACE)
        for name in _PLACE.names or ():
            places[name] = state[name].numpy()
        there = places[places["block"] != _NOWHERE]
        numbers, index = np.unique(there["block"], return_inverse=True)
        ends = np.zeros(len(numbers), np.int64)
        np.maximum.at(ends, index, there["start"] + there["length"])
        live = np.zeros(len(numbers), np.int64)
        np.add.at(live, index, there["length"])
        if min(there["start"].min(initial=0), there["length"].min(initial=0)) < 0:
            raise CacheError("the state of the token blocks is damaged: negative positions")
        for number, end, count in zip(numbers.tolist(), ends.tolist(), live.tolist(), strict=True):
            if number not in blocks or end > blocks[number].filled:
                raise CacheError(f"the state of the token blocks is damaged: tokens missing in block {number}")
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
        """Make room for a number; the doubling makes it cheap on average."""
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

    def _give_up_deadest(self) -> None:
        given_up = max(self._blocks, key=lambda n: self._blocks[n].filled - self._blocks[n].live)
        if given_up == self._newest:
            self._newest = _NOWHERE
        block = self._blocks.pop(given_up)
        self.stored_tokens -= block.filled
        places = self._places[: self._known]
        for number in np.flatnonzero(places["block"] == given_up).tolist():
            _, start, length = places[number].item()
            self._write(number, block.tokens[start : start + length])
