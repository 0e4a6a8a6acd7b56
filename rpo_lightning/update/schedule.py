"""Learning-rate schedules, by the names that transformers gives them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rpo_lightning.core.errors import ConfigurationError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningRateSchedule:
    """A schedule over the updates of a run.

    Attributes:
        name: As in ``transformers.get_scheduler``: ``constant``, ``linear``, ``cosine``,
            ``cosine_with_min_lr``, ``constant_with_warmup``, …
        warmup_share: Share of the updates during which the rate rises from 0.
        arguments: Further arguments of the schedule, e.g. ``{min_lr_rate: 0.1}``.
    """

    name: str = "constant"
    warmup_share: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share <= 1:
            raise ConfigurationError(f"model.lr_schedule.warmup_share must be from 0 to 1, got {self.warmup_share}")
        if self.warmup_share and self.name == "constant":
            raise ConfigurationError(
                "model.lr_schedule.name=constant has no warm-up: use constant_with_warmup, or a warmup_share of 0"
            )

    def length(self, trainer: Any, updates_per_rollout: int, may_skip_updates: bool) -> float:
        """Updates over which the schedule runs; infinite where the trainer sets no limit.

        Args:
            trainer: Lightning's trainer.
            updates_per_rollout: Optimizer steps on one batch of prompts.
            may_skip_updates: Whether some batches make none (dynamic sampling).
        """
        updates: float = trainer.max_steps if trainer.max_steps != -1 else float("inf")
        if self.name == "constant":
            return updates
        of_epochs: float = trainer.estimated_stepping_batches * updates_per_rollout
        if may_skip_updates and of_epochs < updates:
            log.warning(
                "dynamic sampling makes fewer updates than batches, so that the learning-rate schedule will not reach "
                "its end: set trainer.max_steps to what the run will reach"
            )
        return min(updates, of_epochs)

    def build(self, optimizer: Optimizer, updates: float) -> LRScheduler:
        """Make the scheduler.

        Args:
            optimizer: What it steers.
            updates: Updates of the whole run; infinite where no limit is set.

        Raises:
            ConfigurationError: The schedule needs a limit, or does not exist.
        """
        if updates == float("inf") and self.name != "constant":
            raise ConfigurationError(
                f"model.lr_schedule {self.name!r} needs to know how long the run is: set trainer.max_steps or "
                "trainer.max_epochs"
            )
        total = 0 if updates == float("inf") else int(updates)
        try:
            return get_scheduler(
                self.name,
                optimizer,
                num_warmup_steps=round(self.warmup_share * total),
                num_training_steps=total,
                scheduler_specific_kwargs=dict(self.arguments),
            )
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"model.lr_schedule: {str(error).splitlines()[0]}") from error
