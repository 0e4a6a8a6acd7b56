"""Token blocks return what was stored, bound their memory, and never change views that they handed out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpo_lightning.cache.token_blocks import LIVE_TOKENS_PER_DEAD_TOKEN, SMALLEST_BLOCK, TokenBlocks
from rpo_lightning.core.errors import CacheError


def allocated_tokens(blocks: TokenBlocks) -> int:
    return sum(len(b.tokens) for b in blocks._blocks.values())


def test_random_updates_keep_every_response_and_the_room_they_take():
    rng = np.random.default_rng(0)
    blocks, expected = TokenBlocks(), {}
    for _ in range(20_000):
        number = int(rng.integers(0, 1000))
        expected[number] = rng.integers(0, 2**31 - 1, int(rng.integers(0, 3000)), dtype=np.int32)
        blocks[number] = expected[number]
        live = sum(map(len, expected.values())) if len(expected) % 100 == 0 else blocks.live_tokens
        assert blocks.live_tokens == live
        dead = allocated_tokens(blocks) - live
        # Dead tokens, the unused end of the newest block, and the ends of blocks that were too short for a response.
        assert dead <= live / LIVE_TOKENS_PER_DEAD_TOKEN + 2 * SMALLEST_BLOCK + 3000 * len(blocks._blocks)
    assert blocks.stored_tokens < blocks.live_tokens * (1 + 1 / LIVE_TOKENS_PER_DEAD_TOKEN) + 2 * SMALLEST_BLOCK
    assert len(blocks) == len(expected)
    for number, ids in expected.items():
        assert np.array_equal(blocks[number], ids)
    assert blocks.lengths(1001).tolist() == [len(expected[n]) if n in expected else -1 for n in range(1001)]


def test_room_does_not_grow_when_the_same_response_is_replaced_a_thousand_times():
    blocks = TokenBlocks()
    for i in range(1000):
        blocks[0] = np.full(2000, i, np.int32)
    assert allocated_tokens(blocks) <= 3 * SMALLEST_BLOCK  # two million tokens were written
    assert blocks[0].tolist() == [999] * 2000


def test_what_was_given_out_never_changes_and_cannot_be_written_to():
    blocks = TokenBlocks()
    blocks[0] = np.arange(1000, dtype=np.int32)
    view = blocks[0]
    for i in range(1000):
        blocks[0] = np.full(1000, i, np.int32)
    assert view.tolist() == list(range(1000))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_a_state_shares_its_memory_with_the_blocks():
    blocks = TokenBlocks()
    blocks[0], blocks[5] = np.arange(1000, dtype=np.int32), np.arange(10, dtype=np.int32)
    state = blocks.state_dict()
    (tokens,) = state["blocks"].values()
    assert np.shares_memory(tokens.numpy(), blocks[0])
    assert tokens.untyped_storage().nbytes() == 4 * 1010  # only the filled part of a block is saved
    loaded = TokenBlocks()
    loaded.load_state_dict(state)
    assert np.shares_memory(tokens.numpy(), loaded[0])
    assert [n in loaded for n in range(7)] == [True, False, False, False, False, True, False]


def test_two_that_loaded_one_state_change_independently():
    first = TokenBlocks()
    first[0], first[1] = np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)
    second, third = TokenBlocks(), TokenBlocks()
    for blocks in (second, third):
        blocks.load_state_dict(first.state_dict())
    second[0], third[1] = np.full(2, 7, np.int32), np.full(2, 8, np.int32)
    assert [b[n].tolist() for b in (first, second, third) for n in (0, 1)] == [
        [0, 1, 2, 3, 4], [0, 1, 2], [7, 7], [0, 1, 2], [0, 1, 2, 3, 4], [8, 8],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("start", 100, "tokens missing in block 0"),
        ("block", 3, "tokens missing in block 3"),
        ("length", -5, "negative"),
    ],
)
def test_a_damaged_state_is_refused(column, value, message):
    blocks = TokenBlocks()
    blocks[0] = np.arange(5, dtype=np.int32)
    state = blocks.state_dict()
    state[column] = torch.tensor([value], dtype=state[column].dtype)
    with pytest.raises(CacheError, match=message):
        TokenBlocks().load_state_dict(state)
