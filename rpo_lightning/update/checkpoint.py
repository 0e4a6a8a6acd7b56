"""The module's part of a checkpoint: counters, and the waiting groups and generators of every rank.

``EpochRepair`` mends the part of a checkpoint that Lightning misreads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import generator_states, run_seed
from rpo_lightning.update.dynamic_sampling import GroupBuffer
from rpo_lightning.update.mismatch import MismatchGuard
from rpo_lightning.update.watch import LearningWatch

log = logging.getLogger(__name__)


def gathered_state(
    iteration: int, guard: MismatchGuard, buffer: GroupBuffer | None, watch: LearningWatch, ranks: Ranks
) -> dict[str, Any]:
    """The state of the run on all ranks; a collective. Any number of ranks can resume it."""
    mine = (buffer.state_dict() if buffer else None, generator_states())
    buffers, generators = zip(*ranks.gather(mine), strict=True)
    return {
        "iteration": iteration,
        "seed": run_seed(),
        "guard": guard.state_dict(),
        "idle_iterations": watch.idle,
        "skipped_updates": (watch.skipped, watch.skipped_in_a_row),
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
    """Restore this rank's part of a state. Warns if the run's seed is not the checkpoint's.

    Returns:
        The states of the global generators, to be set when training begins; ``None`` if the checkpoint's run did not
        have this rank.
    """
    if state["seed"] != run_seed():
        log.warning(
            f"the checkpoint's run had seed_everything={state['seed']}, this one has {run_seed()}: questions come in "
            "another order, some twice in this epoch and some not at all. To resume exactly, use the checkpoint's seed"
        )
    guard.load_state_dict(state["guard"])
    watch.idle = state.get("idle_iterations", 0)  # neither is in checkpoints of earlier releases
    watch.skipped, watch.skipped_in_a_row = state.get("skipped_updates", (0, 0))
    if buffer is not None and state["buffers"][0] is not None:
        buffer.load_state_dicts(state["buffers"], ranks.rank, ranks.size)
    generators: list[dict[str, Any]] = state["generators"]
    return generators[ranks.rank] if ranks.rank < len(generators) else None


def require_same_policy(checkpoint: Mapping[str, Any], policy: nn.Module, trained_only: bool) -> None:
    """Check that a checkpoint holds the parameters of this run's policy. Sharded checkpoints are not looked into.

    With an adapter Lightning would silently skip parameters that the checkpoint lacks, and would train from the start.

    Args:
        checkpoint: As Lightning reads it.
        policy: The policy of this run.
        trained_only: Whether checkpoints of this run hold only what trains, as with an adapter.

    Raises:
        ConfigurationError: It is no checkpoint of an RPO run, or names or sizes differ.
    """
    if "rpo" not in checkpoint:
        raise ConfigurationError(
            "the checkpoint is not one of an RPO run: give --ckpt_path a file that fit wrote, or start from exported "
            "weights with model.policy"
        )
    saved_state = checkpoint.get("state_dict", {})
    shapes = {k.removeprefix("policy."): tuple(v.shape) for k, v in saved_state.items() if k.startswith("policy.")}
    if not shapes:
        return
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    expected = {k: tuple(v.shape) for k, v in policy.state_dict().items() if not trained_only or k in trained}
    differing = next((n for n in sorted({*expected, *shapes}) if expected.get(n) != shapes.get(n)), None)
    if differing is not None:
        saved, here = (
            "no such parameter" if shape is None else f"shape {list(shape)}"
            for shape in (shapes.get(differing), expected.get(differing))
        )
        raise ConfigurationError(
            f"the checkpoint is of another policy or adapter: {differing} has {saved} in the checkpoint and {here} in "
            "this run. Set model.policy and model.adapter as in the run that wrote it"
        )


def warn_of_rare_checkpoints(trainer: Any, updates_per_rollout: int) -> None:
    """Warn if ``ModelCheckpoint(every_n_train_steps=N)`` saves less often than after N updates.

    Checkpoints are written between iterations, and only when N divides the number of updates. With U updates an
    iteration, that is after every lcm(N, U) updates.
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
    """Makes a run resume at the question after its checkpoint's last one.

    Without it, Lightning 2.6 misreads checkpoints written after a run has stopped: its default one with ``max_steps``,
    or ``trainer.save_checkpoint`` after ``fit``. If the run stopped within an epoch, Lightning counts that epoch as
    done and skips the rest of it. If the run stopped at the end of an epoch, Lightning resumes that epoch, finds
    nothing left in it, and shuffles the next epoch as if it were the one after. If the checkpoint was written before
    the first batch, as while a cache is filled, Lightning counts an update that was never made.
    """

    def __init__(self) -> None:
        self._begins_epoch = False

    def load(self, loops: dict[str, Any]) -> None:
        """Mend ``checkpoint["loops"]`` if it counts an unfinished epoch as done.

        Call it before Lightning reads the loops.
        """
        epochs = loops["fit_loop"]["epoch_progress"]
        batches = loops["fit_loop"]["epoch_loop.batch_progress"]
        is_counted = epochs["total"]["processed"] == epochs["total"]["started"] > 0
        is_untouched = not batches["total"]["ready"]
        self._begins_epoch = is_untouched or (is_counted and batches["is_last_batch"])
        if is_counted and not batches["is_last_batch"] and batches["current"]["processed"]:
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    def start(self, fit_loop: Any) -> None:
        """Begin a new epoch if the checkpoint's is complete, or was not begun. Call it when training starts."""
        if self._begins_epoch:
            fit_loop._restarting = False
            fit_loop.epoch_loop.restarting = False
            for loop in (fit_loop, fit_loop.epoch_loop):
                loop.reset_restart_stage()
            epochs = fit_loop.epoch_progress
            for counts in (epochs.total, epochs.current):
                counts.completed = counts.processed
        self._begins_epoch = False
