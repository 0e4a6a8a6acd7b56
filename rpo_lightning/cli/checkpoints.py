"""``--ckpt_path``: finds the checkpoint, looks at it before a policy is loaded, and tells what is wrong with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.callbacks.cache_filling import newest_filling
from rpo_lightning.callbacks.run_folder import experiment_runs, last_checkpoint
from rpo_lightning.core.checkpoint_file import read_checkpoint, require_checkpoint
from rpo_lightning.core.errors import ConfigurationError, RPOError, one_line
from rpo_lightning.core.run_files import CACHE_FILE
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.parallel.checkpoint_files import require_whole
from rpo_lightning.update.checkpoint import require_same_policy

log = logging.getLogger(__name__)

_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_READING = ("resume", "restore", "_restore")


def found_checkpoint(
    trainer: Trainer, path: str | None, to_train: bool, cache: ExperienceCacheCallback | None
) -> str | None:
    """The checkpoint that a setting names; the newest last one of this experiment for ``last``.

    Each run has its own folder, so Lightning would find none for ``last``. A cache that was being filled when a run was
    stopped may be newer than any checkpoint: then it is filled on.

    Args:
        trainer: The trainer.
        path: The setting.
        to_train: Whether training is to go on from it.
        cache: The run's cache.

    Raises:
        ConfigurationError: There is no file at a given path, or it is no checkpoint of a run like this.
        CheckpointError: It is torn or corrupt.
    """
    if path is None:
        path = _of_slurm(trainer, to_train, cache)
    elif path == "last":
        path = _newest(trainer, to_train, cache)
    else:
        _require_usable(path, to_train, trainer)
    return path


def _require_usable(path: str, to_train: bool, trainer: Trainer) -> None:
    """Check a checkpoint that was named, once: it may be large."""
    if path in ("best", "hpc", "registry") or "://" in path:
        return
    file = Path(path)
    if not file.exists():
        raise ConfigurationError(f"--ckpt_path {path}: no such file: check the path")
    if file.is_file():
        require_whole(file)
    require_checkpoint(file, to_train, trainer.strategy.restore_checkpoint_after_setup)


def require_fitting(path: str | None, model: RPOModule, cache: ExperienceCacheCallback | None) -> None:
    """Check that a checkpoint's weights and cache are those of a run like this, before the policy is loaded.

    Args:
        path: The checkpoint. Folders and remote files are not looked into.
        model: The module.
        cache: The run's cache, if it is to be restored.

    Raises:
        ConfigurationError: It is of another policy.
        CacheError: Its cache is damaged, or of another tokenizer.
    """
    if path is None or not Path(path).is_file():
        return
    checkpoint = read_checkpoint(Path(path))
    if model.outline is not None and model.adapter is None:
        require_same_policy(checkpoint, model.outline, trained_only=False)
    state = None if cache is None else checkpoint.get("callbacks", {}).get(cache.state_key)
    if cache is not None and state:
        cache.require_state(state, model)


def _newest(trainer: Trainer, to_train: bool, cache: ExperienceCacheCallback | None) -> str | None:
    """What ``last`` is: a checkpoint; ``None`` if a cache is filled on, or if there is nothing yet."""
    last = last_checkpoint(trainer, to_train)
    filling = _taken_up(trainer, cache, than=last) if to_train else None
    if filling is not None:
        log.info(f"--ckpt_path last: {filling}, a cache that was being filled")
    elif last is None:
        log.warning("--ckpt_path last: there is none yet, so no checkpoint is loaded")
    else:
        log.info(f"--ckpt_path last: {last}")
        return str(last)
    _load_none(trainer)
    return None


def _of_slurm(trainer: Trainer, to_train: bool, cache: ExperienceCacheCallback | None) -> str | None:
    """What a job goes on from without ``--ckpt_path``: SLURM starts the same command again.

    It is the checkpoint that Lightning has written for that, or a newer cache that was being filled.
    """
    if not SLURMEnvironment.detect():
        return None
    path = trainer._checkpoint_connector._hpc_resume_path
    is_remote = path is not None and "://" in path
    if to_train and int(os.environ.get("SLURM_RESTART_COUNT", 0)) and not is_remote:
        filling = _taken_up(trainer, cache, than=None if path is None else Path(path))
        if filling is not None:
            log.info(f"SLURM has started the job again: {filling}, a cache that was being filled")
            _load_none(trainer)
            return None
    if path is not None:
        log.info(f"SLURM: {path}")
        _require_usable(path, to_train, trainer)
    return path


def _load_none(trainer: Trainer) -> None:
    """Have Lightning load no checkpoint. On SLURM it would take one that it has written, without a word."""
    trainer._checkpoint_connector._ckpt_path = None
    trainer._checkpoint_connector._user_managed = True


def _taken_up(trainer: Trainer, cache: ExperienceCacheCallback | None, than: Path | None) -> Path | None:
    """Have the cache go on from the newest one of the experiment that was being filled, if no older than a file."""
    if cache is None or cache.initialisation != "eager":
        return None
    cache.filled_by = newest_filling(experiment_runs(trainer), CACHE_FILE, than, log.warning)
    return cache.filled_by


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
