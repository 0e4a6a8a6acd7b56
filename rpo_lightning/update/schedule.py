"""``model.lr_schedule``: learning-rate schedules by their names in transformers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rpo_lightning.core.errors import ConfigurationError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningRateSchedule:
    """A schedule over the updates of a run.

    Attributes:
        name: A name of ``transformers.get_scheduler``: ``constant``, ``linear``, ``cosine``, ``cosine_with_min_lr``,
            ``constant_with_warmup``, …
        warmup_share: Share of the updates, 0 to 1, during which the rate rises from 0.
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
        """The number of updates over which the schedule runs; infinite if the trainer sets no limit.

        Warns if dynamic sampling will end the run before the schedule.

        Args:
            trainer: Lightning's trainer.
            updates_per_rollout: Updates on the groups of one rollout.
            may_skip_updates: Whether some batches of prompts lead to no update (dynamic sampling).
        """
        updates: float = trainer.max_steps if trainer.max_steps != -1 else float("inf")
        if self.name == "constant":
            return updates
        of_epochs: float = trainer.estimated_stepping_batches * updates_per_rollout
        if may_skip_updates and of_epochs < updates:
            log.warning(
                "dynamic sampling makes fewer updates than batches, so the learning-rate schedule will not reach its "
                "end: set trainer.max_steps to the number of updates that the run will reach"
            )
        return min(updates, of_epochs)

    def build(self, optimizer: Optimizer, updates: float) -> LRScheduler:
        """Make the scheduler.

        Args:
            optimizer: The optimizer whose rate it sets.
            updates: Updates of the whole run; infinite if there is no limit.

        Raises:
            ConfigurationError: The schedule needs a limit, does not exist, or does not take the arguments.
        """
        if updates == float("inf") and self.name != "constant":
            raise ConfigurationError(
                f"model.lr_schedule.name={self.name} needs a run of known length: set trainer.max_steps or "
                "trainer.max_epochs"
            )
        total = 0 if updates == float("inf") else int(updates)
        if self.name == "constant":
            return LambdaLR(optimizer, lambda _: 1)  # as transformers makes it
        # Only here: its module imports peft, which imports bitsandbytes.
        from transformers import get_scheduler

        try:
            return get_scheduler(
                self.name,
                optimizer,
                num_warmup_steps=round(self.warmup_share * total),
                num_training_steps=total,
                scheduler_specific_kwargs=dict(self.arguments),
            )
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"model.lr_schedule.name={self.name}: {str(error).splitlines()[0]}; use a schedule of "
                "transformers.get_scheduler and the arguments that it takes"
            ) from error
