"""What the loss needs besides the policy's log-probs, made on the host and sent to the device together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpo_lightning.core.types import Group
from rpo_lightning.policy.prefix_sharing.rows import Row
from rpo_lightning.policy.prefix_sharing.transfer import sent_together


@dataclass(frozen=True)
class GivenLogprobs:
    """Log-probs that were computed before, right-aligned like those of the policy.

    Attributes:
        values_BS: The log-probs; 0 where none is known.
        known_BS: Where they are known.
    """

    values_BS: Tensor
    known_BS: Tensor


@dataclass(frozen=True)
class GivenInputs:
    """Inputs of the loss for the responses of a micro-batch.

    Attributes:
        advantages_B: Their advantages.
        weights_B: Their weights in the loss.
        counted_B: Whether they are in the loss at all.
        old: Log-probs of the old policy; ``None`` if none is stored.
        engine: Log-probs of the rollout engine.
    """

    advantages_B: Tensor
    weights_B: Tensor
    counted_B: Tensor
    old: GivenLogprobs | None
    engine: GivenLogprobs

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        rows: Sequence[Row],
        advantages: Sequence[Tensor],
        lengths_B: Tensor,
        weights_B: Tensor,
        like_BS: Tensor,
    ) -> GivenInputs:
        """Collect the inputs of some responses.

        Args:
            groups: The groups of the update.
            rows: The responses.
            advantages: Advantages of each group's members, [G].
            lengths_B: Number of loss tokens of each response, on the host.
            weights_B: Weight of each response, on the host.
            like_BS: The policy's log-probs; gives width, dtype and device.
        """
        old_logprobs = [groups[row.group].old_logprobs for row in rows]
        old = [of_group[row.member] if of_group else () for of_group, row in zip(old_logprobs, rows, strict=True)]
        engine = [groups[row.group].completions[row.member].logprobs for row in rows]
        counts = torch.tensor([[len(x) for x in old], [len(x) for x in engine], lengths_B.tolist()])
        of_responses = torch.stack([torch.stack([advantages[r.group][r.member] for r in rows]).double(), weights_B])
        aligned = [_right_aligned(x, like_BS) for x in ((engine, old) if any(old) else (engine,))]
        counts, (advantages_B, weights_B), *values = sent_together(
            [counts, of_responses.to(like_BS.dtype), *aligned], like_BS.device
        )
        position_S = torch.arange(like_BS.shape[1], 0, -1, device=like_BS.device)  # counted from the end
        given = [
            GivenLogprobs(values_BS, position_S <= count_B[:, None])
            for values_BS, count_B in zip(values, (counts[1], counts[0]), strict=False)
        ]
        return cls(advantages_B, weights_B, counts[2] > 0, given[1] if any(old) else None, given[0])


def _right_aligned(rows: Sequence[Sequence[float]], like_BS: Tensor) -> Tensor:
    """Lists as a tensor on the host like another one, filled with zeros on the left."""
    values_BS = torch.zeros(like_BS.shape, dtype=like_BS.dtype)
    for line, row in zip(values_BS, rows, strict=True):
        line[len(line) - len(row) :] = torch.tensor(row, dtype=like_BS.dtype)
    return values_BS
