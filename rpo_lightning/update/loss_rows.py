"""The responses of an update: how many of their tokens are in the loss, and which must be computed.

A group whose advantages are all 0 changes no gradient, nor does a response that is not in the loss. They are left out
of the passes. They still count in the normalisation, so the gradient is the same to rounding. With binary rewards such
groups are common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.policy.prefix_sharing.rows import Row, rows_of
from rpo_lightning.update.settings import UpdateSettings


@dataclass(frozen=True)
class LossRows:
    """The responses of an update on this rank.

    Attributes:
        rows: A row for each response with a token in the loss scope.
        lengths: Number of loss tokens by group and member; 0 for a response that is left out of the loss.
    """

    rows: Sequence[Row]
    lengths: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, groups: Sequence[Group], settings: UpdateSettings) -> LossRows:
        """Find the loss tokens of groups."""
        rows = rows_of(groups, settings.loss_scope)
        lengths = {}
        for row in rows:
            finished = groups[row.group].completions[row.member].finished
            is_masked = settings.mask_truncated and not finished
            lengths[row.group, row.member] = 0 if is_masked else row.scope_length
        return cls(rows, lengths)

    def totals(self, ranks: Ranks) -> tuple[float, float]:
        """Number of loss tokens, and of responses that have some, on all ranks; a collective."""
        counts = [float(sum(self.lengths.values())), float(sum(n > 0 for n in self.lengths.values()))]
        tokens, sequences = ranks.sum(torch.tensor(counts, dtype=torch.float64)).tolist()
        return tokens, sequences

    def to_compute(self, advantages: Sequence[Tensor], learns_from_zero_advantages: bool) -> list[Row]:
        """The rows that can change the gradient.

        One row stays at least: without a pass parameters have no gradient, and the optimizer would skip them.

        Args:
            advantages: Advantages of each group's members, [G].
            learns_from_zero_advantages: See ``Objective``.
        """
        in_loss = [row for row in self.rows if self.lengths[row.group, row.member]]
        teaches = [learns_from_zero_advantages or bool((of_group != 0).any()) for of_group in advantages]
        teaching = [row for row in in_loss if teaches[row.group]]
        return teaching or list(in_loss or self.rows)[:1]
