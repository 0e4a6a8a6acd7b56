"""Micro-batches hold every response once within their budget, and advantages keep their sums and invariances."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.policy.prefix_sharing.rows import RowCost, micro_batches, rows_of, shared_rows
from rpo_lightning.update.advantages import (
    RLOO,
    BatchScaled,
    GroupScaled,
    MaxRL,
    ReinforcePlusPlusBaseline,
    Unscaled,
)
from rpo_lightning.update.passes import passes_of
from tests.conftest import make_group
from tests.faults.properties import fixed

LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=5)
COSTS = st.builds(
    RowCost,
    attention=st.sampled_from([0.0, 0.01]),
    shares=st.booleans(),
    longest_shared=st.sampled_from([None, 12, 20]),
    holds=st.booleans(),
)


def group_of(lengths, context):
    return make_group([0.0] * len(lengths), [[7] * n for n in lengths], prompt_ids=range(1, context + 1))


# A row of one member, then a shorter one that branches: they lie one after the other and need no padding.
@example([([10, 12, 12], 9), ([1, 1], 9)], 32, RowCost())
@fixed
@given(st.lists(st.tuples(LENGTHS, st.integers(1, 9)), min_size=1, max_size=4), st.integers(4, 60), COSTS)
def test_packing_holds_every_response_once_and_keeps_its_budget(groups, budget, cost):
    rows = rows_of([group_of(lengths, context) for lengths, context in groups], "suffix")
    shared = shared_rows(rows, budget, cost)
    members = Counter((row.group, row.member) for one in shared for row in one.members)
    assert members == Counter((row.group, row.member) for row in rows)
    assert all(len({row.group for row in one.members}) == 1 for one in shared)
    assert all(len(one) <= budget for one in shared if one.branches)

    passes = passes_of(shared, budget, cost.longest_shared, gradient=True)
    packed = Counter((row.group, row.member) for p in passes for one in p.rows for row in one.members)
    assert packed == members
    suffixes = sum(len(row.suffix_ids) for p in passes for one in p.rows for row in one.members)
    assert suffixes == sum(sum(lengths) for lengths, _ in groups)
    whole = [one for one in shared if not one.continues]
    batches = micro_batches(whole, budget, cost.longest_shared)
    assert all(tokens_of(batch) <= budget or len(batch) == 1 for batch in batches)
    # Filling them one after the other, the longest row first, needs as many; and with a lower limit, more.
    for beyond in (False, True):
        limit = cost.longest_shared or 10**9
        kind = [one for one in whole if (not one.branches and len(one) > limit) is beyond]
        ours = [batch for batch in batches if batch[0] in kind]
        assert len(ours) == len(filled(kind, budget))
        several = [tokens_of(batch) for batch in ours if len(batch) > 1]
        if several:
            assert len(filled(kind, max(several) - 1)) > len(ours)


def tokens_of(batch):
    """Tokens of a micro-batch: rows are padded to the longest, or one after the other where one of them branches."""
    return sum(map(len, batch)) if any(one.branches for one in batch) else len(batch) * max(map(len, batch))


def filled(rows, budget):
    batches = []
    for row in sorted(rows, key=lambda r: (-len(r), r.members[0].group, r.members[0].member)):
        if batches and tokens_of([*batches[-1], row]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


REWARDS = st.lists(
    st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=6).filter(lambda r: max(r) > min(r)),
    min_size=1,
    max_size=4,
)
CENTRED = (GroupScaled(), BatchScaled(), Unscaled(), RLOO(), ReinforcePlusPlusBaseline())
SCALED = (GroupScaled(), BatchScaled(), ReinforcePlusPlusBaseline())
every_centred = pytest.mark.parametrize("estimator", CENTRED, ids=lambda e: type(e).__name__)


def advantages(estimator, rewards):
    return estimator.advantages([make_group(r) for r in rewards], {}, Ranks())


@every_centred
@fixed
@given(rewards=REWARDS)
def test_the_advantages_of_a_group_sum_to_zero(estimator, rewards):
    for of_group in advantages(estimator, rewards):
        assert float(of_group.sum()) == pytest.approx(0, abs=1e-9)


@fixed
@given(REWARDS)
def test_advantages_of_a_group_have_a_deviation_of_one(rewards):
    for of_group in advantages(GroupScaled(), rewards):
        assert float(of_group.std()) == pytest.approx(1, abs=1e-4)


@every_centred
@fixed
@given(rewards=REWARDS, order=st.randoms(use_true_random=False))
def test_advantages_follow_their_members(estimator, rewards, order):
    places = [order.sample(range(len(r)), len(r)) for r in rewards]
    moved = advantages(estimator, [[r[i] for i in p] for r, p in zip(rewards, places, strict=True)])
    for before, after, p in zip(advantages(estimator, rewards), moved, places, strict=True):
        torch.testing.assert_close(after, before[p])


@pytest.mark.parametrize("estimator", [GroupScaled(), Unscaled(), RLOO()], ids=lambda e: type(e).__name__)
@fixed
@given(rewards=REWARDS, shifts=st.lists(st.integers(-50, 50), min_size=4, max_size=4))
def test_a_shift_of_a_groups_rewards_changes_nothing(estimator, rewards, shifts):
    shifted = [[value + shift for value in r] for r, shift in zip(rewards, shifts, strict=False)]
    for before, after in zip(advantages(estimator, rewards), advantages(estimator, shifted), strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("estimator", SCALED, ids=lambda e: type(e).__name__)
@fixed
@given(rewards=REWARDS, scale=st.sampled_from([0.5, 3.0, 40.0]))
def test_scaled_advantages_do_not_depend_on_the_unit_of_the_reward(estimator, rewards, scale):
    scaled = [[value * scale for value in r] for r in rewards]
    for before, after in zip(advantages(estimator, rewards), advantages(estimator, scaled), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@fixed
@given(REWARDS)
def test_max_rl_advantages_are_the_centred_rewards_over_their_mean(rewards):
    positive = [[value + 9 for value in r] for r in rewards]
    for r, of_group in zip(positive, advantages(MaxRL(), positive), strict=True):
        mean = sum(r) / len(r)
        torch.testing.assert_close(of_group, torch.tensor([(value - mean) / mean for value in r], dtype=torch.float64))
