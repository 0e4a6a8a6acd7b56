"""Group-relative advantages (eq. 7 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks

AdvantageScale = Literal["group", "batch", "none"]
_EPSILON = 1e-6


def group_advantages(
    rewards: Sequence[Sequence[float]], scale: AdvantageScale = "group", ranks: Ranks | None = None
) -> list[Tensor]:
    """Rewards minus their group's mean, scaled.

    Args:
        rewards: Rewards of each group; groups may differ in size but have at least two members.
        scale: Divide by the standard deviation of the ``group`` (GRPO), of the whole ``batch``'s
            rewards on all ranks, or not at all (``none``, Dr. GRPO). Standard deviations are the sample's (n - 1),
            plus 1e-6, so that a group without variance gets zeros.
        ranks: Who has the rest of the batch. With ``batch`` all ranks must call it.

    Returns:
        For each group its advantages, [G], float64.
    """
    groups = [torch.tensor(r, dtype=torch.float64) for r in rewards]
    centred = [r - r.mean() for r in groups]
    if scale == "group":
        centred = [c / (r.std() + _EPSILON) for c, r in zip(centred, groups, strict=True)]
    elif scale == "batch":
        deviation = _deviation(torch.cat([*groups, torch.zeros(0, dtype=torch.float64)]), ranks or Ranks()) + _EPSILON
        centred = [c / deviation for c in centred]
    return centred


def _deviation(values: Tensor, ranks: Ranks) -> Tensor:
    """Standard deviation of the values of all ranks."""
    count, total = ranks.sum(torch.stack([torch.tensor(len(values), dtype=torch.float64), values.sum()]))
    squares = ranks.sum((values - total / count).square().sum())
    return (squares / (count - 1)).sqrt()
