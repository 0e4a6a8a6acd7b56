"""The parts of an update that follow from several settings together, and what is told of settings that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.update.advantages import AdvantageEstimator
from rpo_lightning.update.importance import ImportanceCorrection, NoCorrection, TokenTruncated
from rpo_lightning.update.objectives import Objective
from rpo_lightning.update.settings import UpdateSettings

log = logging.getLogger(__name__)


def chosen_advantages(
    settings: UpdateSettings, objective: Objective, reward_weights: Mapping[str, float], drops_equal_rewards: bool
) -> AdvantageEstimator:
    """The estimator of the settings, or else the one of the objective's paper. Warns of what does not fit.

    Args:
        settings: The settings of the update.
        objective: The objective.
        reward_weights: Weight of each term of the reward.
        drops_equal_rewards: Whether groups of equal rewards are dropped before the update.
    """
    chosen = settings.advantages or objective.default_advantages()
    name, usual = type(chosen).__name__, type(objective).default_advantages
    if objective.needs_default_advantages and not isinstance(chosen, usual):
        log.warning(
            f"model.objective={type(objective).__name__} is published with model.update.advantages={usual.__name__}; "
            f"with {name} it is another method"
        )
    caveat = chosen.caveat(reward_weights)
    if caveat is not None:
        log.warning(caveat)
    if chosen.learns_from_equal_rewards and drops_equal_rewards:
        log.warning(
            f"model.dynamic_sampling drops groups of equal rewards, from which model.update.advantages={name} may learn"
        )
    return chosen


def chosen_correction(
    settings: UpdateSettings, objective: Objective, caveat: str | None
) -> ImportanceCorrection | None:
    """The importance correction; ``None`` if the engine's log-probs cannot be compared with the trainer's.

    Args:
        settings: The settings of the update.
        objective: The objective.
        caveat: Why the engine's log-probs cannot be compared; ``None`` if they can.

    Raises:
        ConfigurationError: The objective corrects by itself, and the settings ask for a correction.
    """
    given = settings.importance_correction
    if objective.corrects_mismatch and given is not None and not isinstance(given, NoCorrection):
        raise ConfigurationError(
            f"model.objective={type(objective).__name__} takes its ratio to the engine's log-probs, which corrects for "
            f"them; with model.update.importance_correction={type(given).__name__} they would count twice: leave it out"
        )
    if caveat is not None:
        log.warning(f"{caveat}: neither importance_correction nor mismatch_bound is applied")
        return None
    return given or (NoCorrection() if objective.corrects_mismatch else TokenTruncated())
