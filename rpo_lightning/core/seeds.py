"""Seeds of everything that is drawn, derived from one seed of the run (Lightning's ``seed_everything``).

Rollouts, cuts and cache refreshes derive their seeds from the run's seed and from what is drawn: rank and iteration,
or question and visit. They use no global generator, so a resumed run draws what the uninterrupted run would have
drawn. Dropout and user code may use the global generators; checkpoints hold their states.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class SeedPurpose(IntEnum):
    """What a seed is for. Different purposes get different random numbers."""

    TRAINING = 0
    EVALUATION = 1
    INITIALISATION = 2
    CUT = 3
    REFRESH = 4
    INITIAL_CHOICE = 5
    SELECTION = 6


def run_seed() -> int:
    """The seed given to ``seed_everything`` or ``--seed_everything``; 0 if none was given."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(purpose: SeedPurpose, *parts: int) -> int:
    """A seed for a purpose and its parts, e.g. rank and iteration."""
    return int(np.random.SeedSequence([run_seed(), purpose, *parts]).generate_state(1, np.uint32)[0])


def derive_generator(purpose: SeedPurpose, *parts: int) -> np.random.Generator:
    """A generator for a purpose and its parts, e.g. question and visit."""
    return np.random.default_rng([run_seed(), purpose, *parts])


def generator_states() -> dict[str, Any]:
    """States of Python's and torch's global generators, as primitives and tensors."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Restore the global generators; CUDA's only if the number of devices is the same."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
