"""Group-relative advantages equal hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from rpo_lightning.update.advantages import group_advantages

REWARDS = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0]]


def test_group_scale_divides_by_the_groups_own_deviation():
    first, second = group_advantages(REWARDS, "group")
    # Sample deviations: sqrt(4 * 0.25 / 3) and sqrt(2).
    assert first.tolist() == pytest.approx([0.5 / (1 / 3) ** 0.5 * sign for sign in (1, -1, -1, 1)], abs=1e-5)
    assert second.tolist() == pytest.approx([1 / 2**0.5, -1 / 2**0.5], abs=1e-5)


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    first, second = group_advantages(REWARDS, "batch")
    deviation = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0]).std().item()
    assert first[0].item() == pytest.approx(0.5 / deviation, rel=1e-4)
    assert second[0].item() == pytest.approx(1.0 / deviation, rel=1e-4)


def test_no_scale_only_centres():
    assert group_advantages(REWARDS, "none")[1].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_variance_gets_zeros(scale):
    advantages = group_advantages([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]], scale)
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]
