"""``--ckpt_path``: finds the checkpoint, looks at it before a policy is loaded, and tells what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from lightning.pytorch import Trainer

from rpo_lightning.callbacks.run_folder import last_checkpoint
from rpo_lightning.core.checkpoint_file import require_checkpoint
from rpo_lightning.core.errors import ConfigurationError, RPOError, one_line

log = logging.getLogger(__name__)

_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_READING = ("resume", "restore", "_restore")


def found_checkpoint(trainer: Trainer, path: str | None, to_train: bool) -> str | None:
    """The checkpoint that a setting names; the newest last one of this experiment for ``last``.

    Each run has its own folder, so Lightning would find none.

    Args:
        trainer: The trainer.
        path: The setting.
        to_train: Whether training is to go on from it.

    Raises:
        ConfigurationError: There is no file at a given path, or it is no whole checkpoint.
    """
    if path == "last":
        found = last_checkpoint(trainer)
        if found is None:
            log.warning("--ckpt_path last: there is none yet, so no checkpoint is loaded")
            return None
        log.info(f"--ckpt_path last: {found}")
        path = str(found)
    if path in (None, "best", "hpc", "registry") or "://" in str(path):
        return path
    file = Path(str(path))
    if not file.exists():
        raise ConfigurationError(f"--ckpt_path {path}: no such file: check the path")
    require_checkpoint(file, to_train, trainer.strategy.restore_checkpoint_after_setup)
    return path


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
