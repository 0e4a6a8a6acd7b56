"""Logged metrics of rollouts, updates and whole iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.policy.prefix_sharing.logprobs import TokenLogprobs
from rpo_lightning.update.mismatch import Mismatch
from rpo_lightning.update.objectives.base import LossOutput

_NAMES = ("tokens", "total", "policy", "entropy", "kl", "clip_share")


class UpdateMetrics:
    """Adds up the metrics of an update over its micro-batches, on the device: the host reads them once an update.

    Attributes:
        mismatch: Differences between the engine's and the trainer's log-probs.
    """

    def __init__(self) -> None:
        self.mismatch = Mismatch()
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._ratio_deviation_max = torch.zeros((), dtype=torch.float64)

    def add(self, output: LossOutput, computed: TokenLogprobs, mask_BS: Tensor) -> None:
        """Add a micro-batch.

        Args:
            output: Its loss.
            computed: Its log-probs and entropies.
            mask_BS: True at loss tokens.
        """
        entropy = (computed.entropy_BS * mask_BS).sum()
        values = (mask_BS.sum(), output.loss, output.policy_loss, entropy, output.kl_sum, output.clipped_sum)
        self._sums = self._sums.to(mask_BS.device) + torch.stack([v.detach().double() for v in values])
        deviation = output.ratio_deviation_max.detach().double()
        self._ratio_deviation_max = torch.maximum(self._ratio_deviation_max.to(mask_BS.device), deviation)

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The update's metrics over all ranks, ``loss/…`` and ``mismatch/…``; a collective."""
        sums = dict(zip(_NAMES, ranks.sum(self._sums).tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss/total": sums["total"],
            "loss/policy": sums["policy"],
            "loss/ratio_deviation_max": float(ranks.max(self._ratio_deviation_max)),
            **{f"loss/{name}": sums[name] / tokens for name in ("entropy", "kl", "clip_share")},
            **self.mismatch.metrics(ranks),
        }


@dataclass(frozen=True)
class IterationRecord:
    """Figures of an iteration.

    Attributes:
        metrics: Metrics of its rollout.
        phase_seconds: Seconds of each phase.
        phase_tokens: Tokens of each phase.
        responses: Number of sampled responses.
        killed: Number of gradings whose process was killed or died.
        skipped: Number of updates that were skipped, the same on all ranks.
        usable_groups: Number of sampled groups that this or a later update can learn from.
        idle_tokens: Decoded tokens of the other groups, which taught nothing.
        failed: Number of scores that are 0 because a function raised.
        terms: Sum and number of the values of each term of the reward, where it applies.
    """

    metrics: dict[str, float]
    phase_seconds: dict[str, float]
    phase_tokens: dict[str, int]
    responses: int
    killed: int
    skipped: int = 0
    usable_groups: int = 0
    idle_tokens: int = 0
    failed: int = 0
    terms: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def over(self, ranks: Ranks) -> IterationRecord:
        """The record over all ranks; a collective. Counts and tokens are summed, metrics and seconds averaged."""
        records = ranks.gather(self)
        if len(records) == 1:
            return self
        metrics = _means([r.metrics for r in records])
        if "reward/std" in metrics:
            squares = _means(
                [{"square": r.metrics["reward/std"] ** 2 + r.metrics["reward/mean"] ** 2} for r in records]
            )
            metrics["reward/std"] = max(squares["square"] - metrics["reward/mean"] ** 2, 0.0) ** 0.5
        phases = dict.fromkeys(phase for r in records for phase in r.phase_tokens)
        return IterationRecord(
            metrics=metrics,
            phase_seconds=_means([r.phase_seconds for r in records]),
            phase_tokens={phase: sum(r.phase_tokens.get(phase, 0) for r in records) for phase in phases},
            responses=sum(r.responses for r in records),
            killed=sum(r.killed for r in records),
            skipped=self.skipped,
            usable_groups=sum(r.usable_groups for r in records),
            idle_tokens=sum(r.idle_tokens for r in records),
            failed=sum(r.failed for r in records),
            terms={
                name: (sum(r.terms[name][0] for r in records), sum(r.terms[name][1] for r in records))
                for name in self.terms
            },
        )

    def logged(self) -> dict[str, float]:
        """All figures under the names that loggers get."""
        return {
            **self.metrics,
            **{f"reward/{name}": total / count for name, (total, count) in self.terms.items() if count},
            "reward/grading_killed": float(self.killed),
            "reward/grading_failed": float(self.failed),
            "update/skipped": float(self.skipped),
            **{f"time/{phase}": seconds for phase, seconds in self.phase_seconds.items()},
            **{f"tokens/{phase}": float(tokens) for phase, tokens in self.phase_tokens.items()},
        }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every key over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: sum(values) / len(values) for key in keys if (values := [row[key] for row in rows if key in row])}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of freshly sampled groups, ``reward/…`` and ``rollout/…``.

    ``rollout/decoded_tokens_per_sample`` counts suffixes only; ``rollout/response_tokens`` counts prefixes too.
    ``rollout/all_right_share`` and ``rollout/all_wrong_share`` are parts of ``rollout/zero_variance_share``.
    ``rollout/informative_share`` is the share of the groups with right and wrong members.
    """
    count = len(groups)
    members = [(g, c) for g in groups for c in g.completions]
    equal = [g for g in groups if not g.has_variance]
    rewards = [r for g in groups for r in g.rewards]
    mean = sum(rewards) / len(rewards)
    return {
        "reward/mean": mean,
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        "reward/correct_share": sum(g.correct_count for g in groups) / len(members),
        "rollout/decoded_tokens_per_sample": sum(len(c.token_ids) for _, c in members) / len(members),
        "rollout/response_tokens": sum(sum(g.lengths) for g in groups) / len(members),
        "rollout/kept_prefix_tokens": sum(len(g.request.prefix_ids) for g in groups) / count,
        "rollout/full_path_share": sum(not g.request.prefix_ids for g in groups) / count,
        "rollout/truncated_share": sum(not c.finished for _, c in members) / len(members),
        "rollout/informative_share": sum(0 < g.correct_count < len(g.samples) for g in groups) / count,
        "rollout/zero_variance_share": len(equal) / count,
        "rollout/all_right_share": sum(g.correct_count == len(g.samples) for g in equal) / count,
        "rollout/all_wrong_share": sum(g.correct_count == 0 for g in equal) / count,
    }


def term_sums(groups: Sequence[Group]) -> dict[str, tuple[float, int]]:
    """Sum and number of the values of each term of the reward, over the responses to which it applies."""
    known = {
        term: [value for group in groups for value in group.reward_terms[term] if value is not None]
        for term in groups[0].reward_terms
    }
    return {term: (sum(values), len(values)) for term, values in known.items()}


def rollout_tokens(groups: Sequence[Group]) -> dict[str, int]:
    """Tokens of a rollout by phase: each group's context once (``prefill``), and all suffixes (``decode``)."""
    return {
        "prefill": sum(len(g.request.prompt.token_ids) + len(g.request.prefix_ids) for g in groups),
        "decode": sum(len(c.token_ids) for g in groups for c in g.completions),
    }
