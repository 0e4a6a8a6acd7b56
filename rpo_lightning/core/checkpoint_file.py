"""Checkpoint files, looked at before a policy is loaded. They are read without running anything that they hold."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rpo_lightning.core.errors import ConfigurationError, one_line

# What the trainer needs besides the weights to go on.
_OF_TRAINING = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
_OF_RUN = ("iteration", "seed", "guard", "buffers", "generators")
_OF_PROGRESS = ("epoch_progress", "epoch_loop.batch_progress")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def require_checkpoint(path: Path, to_train: bool, takes_folders: bool) -> None:
    """Check a checkpoint. Tensors are mapped, not read.

    Args:
        path: The file, or the folder of a strategy that splits checkpoints, into which nothing is looked.
        to_train: Whether training is to go on from it; otherwise only its weights count.
        takes_folders: Whether the run's strategy reads folders.

    Raises:
        ConfigurationError: It is damaged, or no checkpoint of an RPO run.
    """
    if path.is_dir():
        if not takes_folders or not any(path.iterdir()):
            raise ConfigurationError(
                f"--ckpt_path {path}: a folder that is no checkpoint of trainer.strategy: name a file, or use the "
                "strategy of the run that wrote it"
            )
        return
    checkpoint = read_checkpoint(path)
    if "rpo" not in checkpoint or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ConfigurationError(
            f"--ckpt_path {path}: not a checkpoint of an RPO run: name a file that fit wrote, or start from exported "
            "weights with model.policy"
        )
    if not to_train:
        return
    run = checkpoint["rpo"]
    missing = [key for key in _OF_TRAINING if key not in checkpoint]
    missing += [key for key in ("epoch", "global_step") if not isinstance(checkpoint.get(key, 0), int)]
    missing += ["optimizer_states"] if not checkpoint.get("optimizer_states", True) else []
    missing += [f"loops.fit_loop.{key}" for key in _OF_PROGRESS if not _is_progress(checkpoint.get("loops"), key)]
    missing += [f"rpo.{key}" for key in _OF_RUN if not isinstance(run, Mapping) or key not in run]
    if missing:
        raise ConfigurationError(
            f"--ckpt_path {path}: holds no {missing[0]}, which training needs to go on: name a checkpoint that was "
            "saved without save_weights_only, or start from exported weights with model.policy"
        )


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a file holds. Its tensors are mapped: they are read when they are used.

    Raises:
        ConfigurationError: It is damaged, or holds Python objects.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        name = _FORBIDDEN.search(str(error))
        held = f"the Python object {name[1]}" if name else "Python objects"
        raise ConfigurationError(
            f"--ckpt_path {path}: holds {held}, which could run code when it is read, so it is not: name a checkpoint "
            "that fit wrote"
        ) from error
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"--ckpt_path {path}: torn, or no checkpoint ({one_line(error)[:80]}): name another checkpoint"
        ) from error
    return found if isinstance(found, Mapping) else {}


def _is_progress(loops: Any, key: str) -> bool:
    """Whether the state of Lightning's loops has two counts of this name."""
    of_fit = loops.get("fit_loop") if isinstance(loops, Mapping) else None
    counts = of_fit.get(key) if isinstance(of_fit, Mapping) else None
    return isinstance(counts, Mapping) and all(isinstance(counts.get(name), Mapping) for name in ("total", "current"))
