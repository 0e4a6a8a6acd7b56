"""What the logs say about an update: sums over its micro-batches and over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_lightning.logprobs import TokenLogprobs
from rpo_lightning.mismatch import Mismatch
from rpo_lightning.objectives.base import LossOutput
from rpo_lightning.ranks import Ranks

_NAMES = ("tokens", "total", "policy", "entropy", "kl", "clip_share")


class UpdateMetrics:
    """Sums over micro-batches.

    Attributes:
        mismatch: What the engine's and the trainer's log-probs differ by.
    """

    def __init__(self) -> None:
        self.mismatch = Mismatch()
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._ratio_deviation_max = torch.zeros((), dtype=torch.float64)

    def add(self, output: LossOutput, computed: TokenLogprobs, mask_BS: Tensor) -> None:
        """Take in a micro-batch."""
        entropy = (computed.entropy_BS * mask_BS).sum()
        values = (mask_BS.sum(), output.loss, output.policy_loss, entropy, output.kl_sum, output.clipped_sum)
        self._sums += torch.stack([v.detach().cpu().double() for v in values])
        deviation = output.ratio_deviation_max.cpu().double()
        self._ratio_deviation_max = torch.maximum(self._ratio_deviation_max, deviation)

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Metrics of the whole update, ``loss/…`` and ``mismatch/…``; a collective."""
        sums = dict(zip(_NAMES, ranks.sum(self._sums).tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss/total": sums["total"],
            "loss/policy": sums["policy"],
            "loss/tokens": sums["tokens"],
            "loss/ratio_deviation_max": float(ranks.max(self._ratio_deviation_max)),
            **{f"loss/{name}": sums[name] / tokens for name in ("entropy", "kl", "clip_share")},
            **self.mismatch.metrics(ranks),
        }
