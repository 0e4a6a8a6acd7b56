"""States of the global random generators, for checkpoints.

Rollouts, cuts and refreshes do not use them (see ``seeds``); dropout and user code may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch


def generator_states() -> dict[str, Any]:
    """States of Python's and torch's generators, as primitives and tensors."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Put the generators back; CUDA's only where the number of devices is the same."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
