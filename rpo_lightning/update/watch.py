"""Detects runs that cannot learn: no updates, advantages that are all zero, or numbers that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.update.metrics import IterationRecord

log = logging.getLogger(__name__)

# Flat iterations in a row after which to warn.
_FLAT_ITERATIONS = 2
# Advantages below this are rounding: sums of several terms differ in their last digits.
_ZERO = 1e-6


class LearningWatch:
    """Warns once about iterations that teach nothing, and stops a run with too many of them in a row.

    An iteration is *idle* if it made no update and left no group for the next one. It is *flat* if it made an update
    whose advantages are all zero: the rewards within every group are equal. Only idle iterations stop a run.

    An update is *skipped* if its loss, its log-probs or its gradient are not finite.

    Args:
        max_idle_iterations: Idle iterations in a row after which the run stops; 0 for never.
        max_skipped: Skipped updates in a row after which the run stops; 0 for never.

    Attributes:
        idle: Idle iterations in a row so far.
        skipped: Skipped updates so far.
        skipped_in_a_row: Those since the last update that was made.
    """

    def __init__(self, max_idle_iterations: int, max_skipped: int) -> None:
        self.max_idle_iterations = max_idle_iterations
        self.max_skipped = max_skipped
        self.idle = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._flat = 0
        self._has_warned = False

    def count_update(self, metrics: Mapping[str, float]) -> bool:
        """Count an update.

        Args:
            metrics: Its metrics over all ranks.

        Returns:
            Whether it was made, rather than skipped.

        Raises:
            UpdateError: Too many in a row were skipped.
        """
        fault = _fault(metrics)
        if fault is None:
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.max_skipped and self.skipped_in_a_row >= self.max_skipped:
            raise UpdateError(
                f"{self.skipped_in_a_row} updates in a row were skipped, and the policy is as it was before: {fault} "
                "(model.update.max_skipped=0 never stops a run)"
            )
        if self.skipped_in_a_row == 1:
            log.warning(f"an update was skipped: {fault}")
        return False

    def check(self, record: IterationRecord, advantage_max: float | None) -> None:
        """Check an iteration.

        Args:
            record: Its figures over all ranks.
            advantage_max: The largest absolute advantage of its update; ``None`` if it made none.

        Raises:
            UpdateError: Too many iterations in a row were idle.
        """
        updated = advantage_max is not None
        self._flat = self._flat + 1 if advantage_max is not None and advantage_max < _ZERO else 0
        self.idle = 0 if updated or record.usable_groups else self.idle + 1
        if self.max_idle_iterations and self.idle >= self.max_idle_iterations:
            raise UpdateError(
                f"{self.idle} iterations in a row have not changed the policy. In the last one {_diagnosis(record)} "
                "(model.update.max_idle_iterations=0 never stops a run)"
            )
        if self._has_warned:
            return
        if self.idle:
            log.warning(f"an iteration made no update: {_diagnosis(record)}")
            self._has_warned = True
        elif self._flat == _FLAT_ITERATIONS:
            log.warning(
                f"{self._flat} iterations in a row had equal rewards within every group: all advantages are zero, and "
                f"nothing is learned. In the last one {_diagnosis(record)}"
            )
            self._has_warned = True


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether an update's loss and the log-probs that it was computed from are finite."""
    return math.isfinite(metrics["loss/total"]) and math.isfinite(metrics.get("mismatch/logprob_mean", 0.0))


def _fault(metrics: Mapping[str, float]) -> str | None:
    """What of an update is not finite, from its causes to its effects, and what to change; ``None`` if all is."""
    if is_finite(metrics) and math.isfinite(metrics["loss/grad_norm"]):
        return None
    if not math.isfinite(metrics["loss/entropy"]):
        return (
            "the policy's log-probs are not finite: its weights or activations have overflowed. Lower the learning "
            "rate and resume from an earlier checkpoint, or use another trainer.precision"
        )
    if not math.isfinite(metrics.get("mismatch/logprob_mean", 0.0)):
        return (
            "the rollout engine's log-probs are not finite, and the trainer's are: check the engine's precision and "
            "version"
        )
    if not math.isfinite(metrics["loss/total"]):
        return (
            f"the loss is {metrics['loss/total']}, of log-probs that are finite: check the size of the rewards, "
            "model.update.advantages and the objective's settings"
        )
    return (
        f"the gradient norm is {metrics['loss/grad_norm']}, of a loss that is finite: lower the learning rate, or "
        "resume from an earlier checkpoint"
    )


def _diagnosis(record: IterationRecord) -> str:
    """Figures of an iteration's responses, and what to change."""
    metrics = record.metrics
    correct, truncated = metrics["reward/correct_share"], metrics["rollout/truncated_share"]
    seen = (
        f"{correct:.0%} of its responses are right, {truncated:.0%} are cut off, {record.killed} gradings were killed, "
        f"{record.failed} scores failed, and the mean reward is {metrics['reward/mean']:.3g}"
    )
    hints = []
    if truncated > 0.5:
        hints.append("raise model.max_response_tokens")
    if correct == 0.0:
        hints.append(
            "check that the verifier reads this policy's answers (completions.jsonl shows some), or start from a "
            "policy that solves some of the questions"
        )
    if correct == 1.0:
        hints.append("take harder questions")
    if not hints:
        hints.append("check that the rewards depend on the response, or raise model.group_size")
    return f"{seen}: {'; '.join(hints)}"
