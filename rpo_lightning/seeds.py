"""One seed for a run: Lightning's ``seed_everything``.

Nothing that is drawn during a run comes from a global generator. Rollouts, cuts and cache refreshes
derive their seeds from the run's seed and from *what* is drawn (rank and iteration, or question and
visit), which is what makes a resumed run continue as the uninterrupted one.
"""

from __future__ import annotations

import os
from enum import IntEnum

import numpy as np


class SeedPurpose(IntEnum):
    """What a seed is for: purposes never share random numbers."""

    TRAINING = 0
    EVALUATION = 1
    INITIALISATION = 2
    CUT = 3
    REFRESH = 4
    INITIAL_CHOICE = 5


def run_seed() -> int:
    """The seed given to ``seed_everything`` (or ``--seed_everything``), else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(purpose: SeedPurpose, *parts: int) -> int:
    """A seed of the run for one purpose, e.g. for rank and iteration."""
    return int(np.random.SeedSequence([run_seed(), purpose, *parts]).generate_state(1, np.uint32)[0])


def derive_generator(purpose: SeedPurpose, *parts: int) -> np.random.Generator:
    """A generator of the run for one purpose, e.g. for question and visit."""
    return np.random.default_rng([run_seed(), purpose, *parts])
