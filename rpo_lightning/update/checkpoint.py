"""What a checkpoint needs beyond Lightning's: counters, and the waiting groups and generators of every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import generator_states, run_seed
from rpo_lightning.update.dynamic_sampling import GroupBuffer
from rpo_lightning.update.mismatch import MismatchGuard

log = logging.getLogger(__name__)


def gathered_state(iteration: int, guard: MismatchGuard, buffer: GroupBuffer | None, ranks: Ranks) -> dict[str, Any]:
    """The state of the run on all ranks, for a checkpoint that any number of ranks can resume; a collective."""
    mine = (buffer.state_dict() if buffer else None, generator_states())
    buffers, generators = zip(*ranks.gather(mine), strict=True)
    return {
        "iteration": iteration,
        "seed": run_seed(),
        "guard": guard.state_dict(),
        "buffers": list(buffers),
        "generators": list(generators),
    }


def restore_state(
    state: Mapping[str, Any], guard: MismatchGuard, buffer: GroupBuffer | None, ranks: Ranks
) -> dict[str, Any] | None:
    """Restore this rank's part of it.

    Returns:
        The generators' states, to be set when training begins; none for a rank that there was not then.
    """
    if state["seed"] != run_seed():
        log.warning(
            f"the checkpoint is of a run with seed_everything={state['seed']}, this one has {run_seed()}: questions "
            "come in another order, some of this epoch twice and some not at all"
        )
    guard.load_state_dict(state["guard"])
    if buffer is not None and state["buffers"][0] is not None:
        buffer.load_state_dicts(state["buffers"], ranks.rank, ranks.size)
    generators: list[dict[str, Any]] = state["generators"]
    return generators[ranks.rank] if ranks.rank < len(generators) else None
