"""What a run that a signal has ended leaves, and how one goes on from it: its checkpoint, SLURM's requeue, a line."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning.callbacks.cache_filling import newest_filling
from rpo_lightning.callbacks.run_folder import last_checkpoint, run_checkpoints, run_folder
from rpo_lightning.core.run_files import CACHE_FILE

log = logging.getLogger(__name__)

HOW_TO_GO_ON = "go on with the same command and --ckpt_path last"
_START_AGAIN = "start the same command again"


class Kept(NamedTuple):
    """What is left.

    Attributes:
        what: In words, for the last line.
        how_to_go_on: What the user has to do.
        by_slurm: Whether a job that SLURM starts again finds it.
    """

    what: str
    how_to_go_on: str
    by_slurm: bool = False


def stop_checkpoint(trainer: Trainer) -> Path | None:
    """Write a checkpoint beside those of ``ModelCheckpoint``, unless one of this update is there; a collective.

    Returns:
        The file; ``None`` if there is none, since the run has no ``ModelCheckpoint`` or the disk is full.
    """
    savers = _savers(trainer)
    if not savers:
        return None
    for saver in savers:
        is_of_now = saver._last_checkpoint_saved and saver._last_global_step_saved == trainer.global_step
        if is_of_now and not saver.save_weights_only and _is_written(trainer, Path(saver._last_checkpoint_saved)):
            return Path(saver._last_checkpoint_saved)
    folder = Path(savers[0].dirpath or run_checkpoints(trainer))
    return _save(trainer, folder / f"stopped-step={trainer.global_step}.ckpt")


def slurm_checkpoint(trainer: Trainer) -> Path | None:
    """Write the checkpoint that Lightning looks for when SLURM starts a job again; a collective."""
    for logger in trainer.loggers:
        logger.finalize("finished")
    return _save(trainer, Path(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)))


def requeued() -> str | None:
    """Have SLURM start this job again.

    Returns:
        What to say of it; ``None`` if SLURM does not.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        log.warning(f"scontrol requeue {job}: {error.strerror}")
        return None
    if code:
        log.warning(f"scontrol requeue {job}: failed with code {code}")
        return None
    return f"SLURM starts job {job} again"


def what_is_kept(trainer: Trainer, saved: Path | None, has_trained: bool) -> Kept:
    """What a run that has ended leaves; a collective.

    Args:
        trainer: Its trainer.
        saved: The checkpoint that was written at its end.
        has_trained: Whether it has trained.
    """
    if saved is not None:
        return Kept(f"checkpoint {saved}", HOW_TO_GO_ON, by_slurm=True)
    earlier = last_checkpoint(trainer)
    if has_trained:
        why = (
            "a trial run keeps none"
            if trainer.fast_dev_run  # type: ignore[attr-defined]
            else "it could not be written"
            if _savers(trainer)
            else "there is no ModelCheckpoint in trainer.callbacks"
        )
        if earlier is None:
            return Kept(f"no checkpoint, since {why}: what was trained is lost", _START_AGAIN)
        return Kept(
            f"no checkpoint of it, since {why}; the last one is {earlier}, what came after is lost", HOW_TO_GO_ON
        )
    filling = newest_filling([run_folder(trainer)], CACHE_FILE)
    if filling is not None:
        return Kept(f"nothing was trained yet; the cache so far is {filling}", HOW_TO_GO_ON)
    return Kept("nothing was trained yet", _START_AGAIN if earlier is None else HOW_TO_GO_ON)


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _save(trainer: Trainer, path: Path) -> Path | None:
    trainer.save_checkpoint(path)
    return path if _is_written(trainer, path) else None


def _is_written(trainer: Trainer, path: Path) -> bool:
    """Whether the newest checkpoint is there. If it could not be written, an earlier one may have its name."""
    failure = getattr(trainer.strategy.checkpoint_io, "failure", None)
    return bool(trainer.strategy.broadcast(failure is None and ("://" in str(path) or path.exists())))
