"""What a checkpoint needs beyond Lightning's: counters, waiting groups and generators of every rank; exact epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import generator_states, run_seed
from rpo_lightning.update.dynamic_sampling import GroupBuffer
from rpo_lightning.update.mismatch import MismatchGuard
from rpo_lightning.update.watch import LearningWatch

log = logging.getLogger(__name__)


def gathered_state(
    iteration: int, guard: MismatchGuard, buffer: GroupBuffer | None, watch: LearningWatch, ranks: Ranks
) -> dict[str, Any]:
    """The state of the run on all ranks, for a checkpoint that any number of ranks can resume; a collective."""
    mine = (buffer.state_dict() if buffer else None, generator_states())
    buffers, generators = zip(*ranks.gather(mine), strict=True)
    return {
        "iteration": iteration,
        "seed": run_seed(),
        "guard": guard.state_dict(),
        "idle_iterations": watch.idle,
        "buffers": list(buffers),
        "generators": list(generators),
    }


def restore_state(
    state: Mapping[str, Any],
    guard: MismatchGuard,
    buffer: GroupBuffer | None,
    watch: LearningWatch,
    ranks: Ranks,
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
    watch.idle = state.get("idle_iterations", 0)  # earlier releases did not count them
    if buffer is not None and state["buffers"][0] is not None:
        buffer.load_state_dicts(state["buffers"], ranks.rank, ranks.size)
    generators: list[dict[str, Any]] = state["generators"]
    return generators[ranks.rank] if ranks.rank < len(generators) else None


def warn_of_rare_checkpoints(trainer: Any, updates_per_rollout: int) -> None:
    """Say how often ``ModelCheckpoint(every_n_train_steps=N)`` really saves where an iteration makes several updates.

    Checkpoints are written between iterations, and Lightning looks for a number of updates that N divides.
    """
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0)
        if every and every % updates_per_rollout:
            log.warning(
                f"ModelCheckpoint(every_n_train_steps={every}) saves after every "
                f"{math.lcm(every, updates_per_rollout)} updates: an iteration makes {updates_per_rollout} updates, "
                f"and checkpoints are written between iterations. Use a multiple of {updates_per_rollout}"
            )


class EpochRepair:
    """Makes every checkpoint resume at the question after its last, whoever wrote it and when.

    Lightning 2.6 misreads checkpoints that are written after a run has stopped: its default one with ``max_steps``, or
    ``trainer.save_checkpoint`` after ``fit``. If the run stopped within an epoch, Lightning counts that epoch as done
    and skips the rest of it. If it stopped at the end of an epoch, Lightning resumes that epoch, finds nothing left in
    it, and shuffles the next one as if it were the one after.
    """

    def __init__(self) -> None:
        self._begins_epoch = False

    def load(self, loops: dict[str, Any]) -> None:
        """Look at ``checkpoint["loops"]``, and mark an epoch as unfinished if it is."""
        epochs = loops["fit_loop"]["epoch_progress"]
        batches = loops["fit_loop"]["epoch_loop.batch_progress"]
        is_counted = epochs["total"]["processed"] == epochs["total"]["started"] > 0
        self._begins_epoch = is_counted and batches["is_last_batch"]
        if is_counted and not batches["is_last_batch"] and batches["current"]["processed"]:
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    def start(self, fit_loop: Any) -> None:
        """When training starts: begin a new epoch, if the last one is complete, instead of resuming it."""
        if self._begins_epoch:
            fit_loop._restarting = False
            fit_loop.epoch_loop.restarting = False
            for loop in (fit_loop, fit_loop.epoch_loop):
                loop.reset_restart_stage()
            epochs = fit_loop.epoch_progress
            for counts in (epochs.total, epochs.current):
                counts.completed = counts.processed
        self._begins_epoch = False
