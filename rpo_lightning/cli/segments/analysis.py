"""Segment analysis: what is decided where in a reasoning path (figure 1 of the paper).

For each question a first answer is sampled and cut at a grid of points, and N continuations are sampled from
each. Accuracy against the share kept (or the tokens cut) tells how much the rest of the path still decides.
Continuations of nothing are N answers, whose equal-length prefixes tell how alike answers begin.

Deviation: the paper samples 256 continuations of a few questions; here N and the questions are settings, and
first answers that were right and wrong are told apart, because they have opposite curves.
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
    """A policy whose ``predict`` takes reasoning paths apart.

    Args:
        *args: See :class:`~rpo_lightning.module.RPOModule`.
        continuations: Continuations of each cut (N).
        points: Cuts of each answer, from keeping nothing on in equal shares; the whole answer comes as one more.
        **kwargs: See :class:`~rpo_lightning.module.RPOModule`.
    """

    def __init__(self, *args: Any, continuations: int = 8, points: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if continuations < 2 or points < 1:
            raise ConfigurationError(
                f"segment analysis needs continuations >= 2 and points >= 1, got {continuations} and {points}"
            )
        self.continuations = continuations
        self.points = points

    def predict_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each question and cut."""
        require_requests(requests)
        seeds = [derive_seed(SeedPurpose.EVALUATION, self.global_rank, batch_idx, part) for part in (0, 1)]
        firsts = self.roll_out(requests, 1, self.evaluation_sampling, seeds[0])
        cuts = [(first, share, kept) for first in firsts for kept, share in self._cuts(first).items()]
        groups = self.roll_out(
            [self._continue(first, kept) for first, _, kept in cuts],
            self.continuations,
            self.evaluation_sampling,
            seeds[1],
        )
        rows = [self._row(first, share, kept, group) for (first, share, kept), group in zip(cuts, groups, strict=True)]
        return rows + [self._row(first, 1.0, first.lengths[0], first) for first in firsts]

    def _cuts(self, first: Group) -> dict[int, float]:
        """Tokens kept and their planned share, distinct; at least one token is always sampled anew."""
        length = first.lengths[0]
        shares = [i / self.points for i in reversed(range(self.points))]
        return {min(round(share * length), length - 1): share for share in shares}

    def _continue(self, first: Group, kept: int) -> RolloutRequest:
        whole = full_path_request(first.request.prompt, self.max_response_tokens)
        prefix = first.completions[0].token_ids[:kept]
        return RolloutRequest(whole.prompt, prefix, whole.max_new_tokens - kept, first.lengths[0])

    def _row(self, first: Group, share: float, kept: int, group: Group) -> dict[str, Any]:
        """What came of a cut. The tokens of answers from scratch are kept for their prefixes."""
        prompt, length = first.request.prompt, first.lengths[0]
        return {
            "uid": prompt.uid,
            "question": prompt.text,
            "gold_answer": str(prompt.answer),
            "first_answer": first.samples[0].response,
            "first_correct": first.samples[0].is_correct,
            "first_tokens": length,
            "kept": kept,
            "cut": length - kept,
            "share": share,
            "correct": [s.is_correct for s in group.samples],
            "tokens": [s.length for s in group.samples],
            "answers": self._prefixes(group) if kept == 0 else [],
        }

    def _prefixes(self, group: Group) -> list[list[str]]:
        """Of every answer, its prefixes at equal steps of the shortest one's length."""
        shortest = min(group.lengths)
        ends = sorted({max(round(i * shortest / self.points), 1) for i in range(1, self.points + 1)})
        return [[decode(self.tokenizer, c.token_ids[:end]) for end in ends] for c in group.completions]


def accuracy_of(row: dict[str, Any]) -> float:
    """Share of right continuations."""
    return sum(row["correct"]) / len(row["correct"])


def grouped_by_first_answer(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All rows, and those whose first answer was right and wrong."""
    return {
        "all": list(rows),
        "first answer right": [r for r in rows if r["first_correct"]],
        "first answer wrong": [r for r in rows if not r["first_correct"]],
    }
