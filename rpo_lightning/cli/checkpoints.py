"""``--ckpt_path``: finds the checkpoint, looks at it before a policy is loaded, and tells what is wrong with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from lightning.pytorch import Trainer

from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.callbacks.cache_filling import newest_filling
from rpo_lightning.callbacks.run_folder import experiment_runs, last_checkpoint
from rpo_lightning.core.checkpoint_file import require_checkpoint
from rpo_lightning.core.errors import ConfigurationError, RPOError, one_line
from rpo_lightning.core.run_files import CACHE_FILE
from rpo_lightning.policy.parallel.checkpoint_files import checkpoints_in, require_whole

log = logging.getLogger(__name__)

_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_READING = ("resume", "restore", "_restore")


def found_checkpoint(
    trainer: Trainer, path: str | None, to_train: bool, cache: ExperienceCacheCallback | None
) -> str | None:
    """The checkpoint that a setting names; the newest last one of this experiment for ``last``.

    Each run has its own folder, so Lightning would find none. A cache that was being filled when a run was stopped may
    be newer than any checkpoint: then it is filled on.

    Args:
        trainer: The trainer.
        path: The setting.
        to_train: Whether training is to go on from it.
        cache: The run's cache.

    Raises:
        ConfigurationError: There is no file at a given path, or it is no checkpoint of a run like this.
        CheckpointError: It is torn or corrupt.
    """
    if path == "last":
        last = last_checkpoint(trainer, to_train)
        filling = _taken_up(trainer, cache, than=last) if to_train else None
        if filling is not None:
            log.info(f"--ckpt_path last: {filling}, a cache that was being filled")
            return None
        if last is None:
            log.warning("--ckpt_path last: there is none yet, so no checkpoint is loaded")
            return None
        log.info(f"--ckpt_path last: {last}")
        path = str(last)
    elif path is None and to_train and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        _taken_up(trainer, cache, than=None)  # SLURM starts the same command again
    if path in (None, "best", "hpc", "registry") or "://" in str(path):
        return path
    file = Path(str(path))
    if not file.exists():
        raise ConfigurationError(f"--ckpt_path {path}: no such file: check the path")
    if file.is_file() and checkpoints_in(file.parent) - {file.absolute()}:
        require_whole(file)  # a damaged one is refused with the last good one beside it
    require_checkpoint(file, to_train, trainer.strategy.restore_checkpoint_after_setup)
    if file.is_file():
        require_whole(file)
    return path


def _taken_up(trainer: Trainer, cache: ExperienceCacheCallback | None, than: Path | None) -> Path | None:
    """Have the cache go on from the newest one of the experiment that was being filled, if newer than a file."""
    if cache is None or cache.initialisation != "eager":
        return None
    newest = newest_filling(experiment_runs(trainer), CACHE_FILE)
    if newest is None or (than is not None and than.stat().st_mtime_ns > newest.stat().st_mtime_ns):
        return None
    cache.filled_by = newest
    return newest


@contextmanager
def reading(path: str | None) -> Iterator[None]:
    """Turn what goes wrong while Lightning reads a checkpoint into a line.

    Args:
        path: The checkpoint; ``None`` without one.

    Raises:
        ConfigurationError: The checkpoint lacks something, or holds what it should not.
    """
    try:
        yield
    except RPOError:
        raise
    except Exception as error:
        if path is None or not _arose_while_reading(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)[:120]}"
        raise ConfigurationError(
            f"--ckpt_path {path}: damaged, or not of this run's kind ({problem}): name another checkpoint"
        ) from error


def _arose_while_reading(error: BaseException) -> bool:
    codes = [
        frame.f_code.co_name
        for frame, _ in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == _CONNECTOR
    ]
    return any(name.startswith(_READING) for name in codes)
