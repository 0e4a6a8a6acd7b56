"""Segment analysis: how much each part of a response decides (figure 1 of the paper).

For each question, a first answer is sampled and cut at a grid of points, and n continuations are sampled from each
prefix. Their accuracy against the length of the prefix shows how much the rest of the response still decides. The
continuations of the empty prefix are n answers from scratch. The similarity of their prefixes of equal length shows how
long answers stay alike.

Deviations: the paper samples 256 continuations of a few questions; here n and the questions are settings. Right and
wrong first answers are reported separately, because their curves run in opposite directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import SeedPurpose, derive_seed
from rpo_lightning.core.types import Batch, Group, RolloutRequest, full_path_request
from rpo_lightning.evaluation.module import require_requests
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import decode


class SegmentAnalysis(RPOModule):
    """A policy whose ``predict`` makes a segment analysis.

    Args:
        *args: See ``RPOModule``.
        continuations: Continuations of each prefix (n), at least 2.
        points: Prefixes of each first answer, at equal distances from the empty one. The whole answer is added.
        **kwargs: See ``RPOModule``.
    """

    def __init__(self, *args: Any, continuations: int = 8, points: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if continuations < 2 or points < 1:
            raise ConfigurationError(
                f"model.continuations must be at least 2 and model.points at least 1, got {continuations} and {points}"
            )
        self.continuations = continuations
        self.points = points

    def predict_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> list[dict[str, Any]]:
        """Sample first answers and continuations; returns a record of each question and cut."""
        require_requests(requests)
        seeds = [derive_seed(SeedPurpose.EVALUATION, self.global_rank, batch_idx, part) for part in (0, 1)]
        firsts = self.roll_out(requests, 1, self.evaluation_sampling, seeds[0])
        cuts = [(first, share, length) for first in firsts for length, share in self._cuts(first).items()]
        groups = self.roll_out(
            [self._continue(first, length) for first, _, length in cuts],
            self.continuations,
            self.evaluation_sampling,
            seeds[1],
        )
        rows = [
            self._row(first, share, length, group) for (first, share, length), group in zip(cuts, groups, strict=True)
        ]
        return rows + [self._row(first, 1.0, first.lengths[0], first) for first in firsts]

    def _cuts(self, first: Group) -> dict[int, float]:
        """Shares of a first answer by prefix length in tokens. At least one token is always sampled again."""
        length = first.lengths[0]
        shares = [i / self.points for i in reversed(range(self.points))]
        return {min(round(share * length), length - 1): share for share in shares}

    def _continue(self, first: Group, prefix_length: int) -> RolloutRequest:
        whole = full_path_request(first.request.prompt, self.max_response_tokens)
        prefix = first.completions[0].token_ids[:prefix_length]
        return RolloutRequest(whole.prompt, prefix, whole.max_new_tokens - prefix_length, first.lengths[0])

    def _row(self, first: Group, share: float, prefix_length: int, group: Group) -> dict[str, Any]:
        """The record of a cut. For the empty prefix it holds the answers' prefixes too."""
        prompt, length = first.request.prompt, first.lengths[0]
        return {
            "uid": prompt.uid,
            "question": prompt.text,
            "gold_answer": str(prompt.answer),
            "first_answer": first.samples[0].response,
            "first_correct": first.samples[0].is_correct,
            "first_tokens": length,
            "kept": prefix_length,
            "cut": length - prefix_length,
            "share": share,
            "correct": [s.is_correct for s in group.samples],
            "tokens": [s.length for s in group.samples],
            "answers": self._prefixes(group) if prefix_length == 0 else [],
        }

    def _prefixes(self, group: Group) -> list[list[str]]:
        """The prefixes of each answer, at equal steps up to the length of the shortest answer."""
        shortest = min(group.lengths)
        ends = sorted({max(round(i * shortest / self.points), 1) for i in range(1, self.points + 1)})
        return [[decode(self.tokenizer, c.token_ids[:end]) for end in ends] for c in group.completions]


def accuracy_of(row: dict[str, Any]) -> float:
    """The share of right continuations in a record."""
    return sum(row["correct"]) / len(row["correct"])


def grouped_by_first_answer(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All records, those whose first answer is right, and those whose first answer is wrong."""
    return {
        "all": list(rows),
        "first answer right": [r for r in rows if r["first_correct"]],
        "first answer wrong": [r for r in rows if not r["first_correct"]],
    }
