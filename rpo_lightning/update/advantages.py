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
    """Subtract each group's mean reward and scale.

    Args:
        rewards: Rewards of each group. Groups may differ in size, but each has at least two members.
        scale: What to divide by: ``group``, the group's standard deviation (GRPO); ``batch``, that of all rewards on
            all ranks; ``none``, nothing (Dr. GRPO). Standard deviations are those of a sample (n - 1), plus 1e-6 to
            give a group of equal rewards zeros.
        ranks: The ranks that share the batch. With ``batch`` this is a collective.

    Returns:
        The advantages of each group's members, [G], float64.
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
