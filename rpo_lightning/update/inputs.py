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
        old: Log-probs of the old policy.
        engine: Log-probs of the rollout engine.
    """

    advantages_B: Tensor
    weights_B: Tensor
    counted_B: Tensor
    old: GivenLogprobs
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
        on_host = [of_responses, *(_right_aligned(x, like_BS.shape[1]) for x in (old, engine))]
        (advantages_B, weights_B), old_BS, engine_BS, counts = sent_together(
            [*(x.to(like_BS.dtype) for x in on_host), counts], like_BS.device
        )
        position_S = torch.arange(like_BS.shape[1], 0, -1, device=like_BS.device)  # counted from the end
        known_old_BS, known_engine_BS = position_S <= counts[0, :, None], position_S <= counts[1, :, None]
        return cls(
            advantages_B, weights_B, counts[2] > 0, GivenLogprobs(old_BS, known_old_BS),
            GivenLogprobs(engine_BS, known_engine_BS),
        )  # fmt: skip


def _right_aligned(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Lists as a tensor, filled with zeros on the left, in fp64."""
    values_BS = torch.zeros((len(rows), width), dtype=torch.float64)
    for line, row in zip(values_BS, rows, strict=True):
        line[width - len(row) :] = torch.tensor(row, dtype=torch.float64)
    return values_BS
