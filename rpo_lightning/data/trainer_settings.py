"""Settings of the trainer that do not fit the questions: told before the policy is loaded."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Trainer

from rpo_lightning.core.errors import ConfigurationError

log = logging.getLogger(__name__)


def warn_of_no_training(trainer: Trainer) -> None:
    """Say so if the trainer makes no iteration. Lightning ends without a word."""
    if trainer.limit_train_batches == 0:
        log.warning("trainer.limit_train_batches=0: nothing is trained")


def require_validations(trainer: Trainer, batches: int) -> None:
    """Check that an epoch has as many batches as a validation comes after. Lightning does once the policy is loaded.

    Args:
        trainer: The trainer of a training run.
        batches: The training batches of an epoch.

    Raises:
        ConfigurationError: It has fewer.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    every = trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.check_val_every_n_epoch is not None:
        raise ConfigurationError(
            f"trainer.val_check_interval={every} is more than the {batches} training batches of an epoch: lower it, or "
            "set trainer.check_val_every_n_epoch=null to count batches of all epochs"
        )


def require_monitored(trainer: Trainer, has_questions: bool) -> None:
    """Check that there are validations where a callback monitors them: it would save nothing, or stop the run late.

    Args:
        trainer: The trainer of a training run.
        has_questions: Whether there are validation questions.

    Raises:
        ConfigurationError: There are none.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", None))
        if monitor.startswith("val/") and not (has_questions and trainer.limit_val_batches):
            missing = "trainer.limit_val_batches is 0" if has_questions else "data.val is not set"
            raise ConfigurationError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor}, and {missing}: set it, or monitor "
                "something else"
            )
