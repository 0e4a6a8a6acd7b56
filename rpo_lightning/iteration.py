"""What one iteration took and gave: on a rank, and over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_lightning.ranks import Ranks


@dataclass(frozen=True)
class IterationRecord:
    """Figures of an iteration.

    Attributes:
        metrics: What the logs say about its rollouts.
        phase_seconds: Seconds of each phase.
        phase_tokens: Tokens of each phase.
        samples: Responses that were sampled.
        killed: Gradings that were killed, or died.
    """

    metrics: dict[str, float]
    phase_seconds: dict[str, float]
    phase_tokens: dict[str, int]
    samples: int
    killed: int

    def over(self, ranks: Ranks) -> IterationRecord:
        """The same of all ranks together: counts and tokens add up, the rest is averaged; a collective."""
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
            samples=sum(r.samples for r in records),
            killed=sum(r.killed for r in records),
        )

    def logged(self) -> dict[str, float]:
        """Everything for the logger."""
        return {
            **self.metrics,
            "reward/grading_killed": float(self.killed),
            **{f"time/{phase}": seconds for phase, seconds in self.phase_seconds.items()},
            **{f"tokens/{phase}": float(tokens) for phase, tokens in self.phase_tokens.items()},
        }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every key over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: sum(values) / len(values) for key in keys if (values := [row[key] for row in rows if key in row])}
