"""The optimizer of a run, and a trial of it that needs no policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rpo_lightning.core.errors import ConfigurationError, one_line
from rpo_lightning.update.schedule import LearningRateSchedule

# Length of the run in the trial. A schedule may need one.
_TRIAL_UPDATES = 100


def make_optimizer(factory: Callable[[Iterable[Any]], Optimizer], parameters: Iterable[Any]) -> Optimizer:
    """Make the optimizer.

    Args:
        factory: Makes it from the parameters.
        parameters: What it trains.

    Raises:
        ConfigurationError: It refuses its settings, or its learning rate is not a finite number.
    """
    try:
        optimizer = factory(parameters)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"model.optimizer: {one_line(error)}: change its settings") from error
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if not all(math.isfinite(rate) for rate in rates):
        raise ConfigurationError(f"model.optimizer.lr is {rates[0]}: give a number")
    return optimizer


def try_optimizer(factory: Callable[[Iterable[Any]], Optimizer], schedule: LearningRateSchedule) -> None:
    """Make optimizer and schedule for a matrix of zeros: what they refuse is told before a policy is loaded.

    Raises:
        ConfigurationError: One of them refuses its settings.
    """
    schedule.build(make_optimizer(factory, [nn.Parameter(torch.zeros(2, 2))]), _TRIAL_UPDATES)
