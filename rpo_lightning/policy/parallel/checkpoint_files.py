"""Checkpoint files that are whole, or refused.

Lightning writes a checkpoint into the system's temporary folder and moves it. Between two file systems a move is a
copy, so a run that is killed leaves half a checkpoint under its final name. Torch reads a file with flipped bits
without a word. Here a checkpoint is written beside its final name, and its checksums are compared before it is read.
"""

from __future__ import annotations

import logging
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from rpo_lightning.core.errors import CheckpointError, one_line
from rpo_lightning.core.files import cause_of, put_on_disk, replacing

log = logging.getLogger(__name__)

SUFFIX = ".ckpt"
# Of sharded checkpoints, which are folders: written last by FSDP2 and DeepSpeed.
_LAST_OF_A_FOLDER = ("meta.pt", "latest", "checkpoint")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and refuses to read a damaged one.

    A checkpoint that cannot be written is told once, and the run goes on. No checkpoint is removed until one could be
    written again. Remote paths are left to Lightning.

    Attributes:
        failure: Why the newest checkpoint could not be written; ``None`` if it could.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        self._removed_later: list[Any] = []

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # Torch raises a RuntimeError of its own after the system's.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self._tell(Path(path), cause)
            return
        if self.failure is not None:
            log.info(f"{path}: written; checkpoints can be written again")
        self.failure = None
        while self._removed_later:
            super().remove_checkpoint(self._removed_later.pop())

    @override
    def remove_checkpoint(self, path: Any) -> None:
        if self.failure is None:
            super().remove_checkpoint(path)
        else:
            self._removed_later.append(path)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        if "://" not in str(path) and Path(path).is_file():
            require_whole(Path(path))
        return super().load_checkpoint(path, *args, **options)

    def _tell(self, path: Path, cause: OSError) -> None:
        if self.failure is None:
            last = newest_whole(checkpoints_in(path.parent))
            kept = "there is none yet" if last is None else f"the last one is {last}"
            log.warning(
                f"{path}: this checkpoint could not be written ({cause_of(cause)}). The run goes on and keeps the "
                f"checkpoints that it has; {kept}"
            )
        self.failure = cause_of(cause)


def require_whole(path: Path) -> None:
    """Check that a checkpoint is whole.

    Raises:
        CheckpointError: It is torn or corrupt.
    """
    damage = damage_of(path)
    if damage is None:
        return
    other = newest_whole(checkpoints_in(path.parent) - {path.absolute()})
    remedy = "no whole one is beside it: try --ckpt_path last" if other is None else f"the last good one is {other}"
    raise CheckpointError(f"{path}: the checkpoint is damaged ({damage}); {remedy}")


def newest_whole(
    paths: Iterable[Path],
    tell: Callable[[str], None] = lambda _: None,
    lacks: Callable[[Path], str | None] = lambda _: None,
) -> Path | None:
    """The newest of several checkpoints that is not damaged.

    Args:
        paths: Some of them may have gone.
        tell: Takes a line for each one that is newer and passed over.
        lacks: Why a whole one cannot be taken; ``None`` if it can.
    """
    for path in sorted({p for p in paths if p.exists()}, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        damage = damage_of(path)
        problem = lacks(path) if damage is None else f"the checkpoint is damaged ({damage})"
        if problem is None:
            return path
        tell(f"{path} is passed over: {problem}")
    return None


def checkpoints_in(folder: Path) -> set[Path]:
    """The checkpoints in a folder."""
    return set(folder.absolute().glob(f"*{SUFFIX}"))


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file or a folder; ``None`` if it is whole. Reads all of a file."""
    if path.is_dir():
        return None if any((path / name).exists() for name in _LAST_OF_A_FOLDER) else "parts of it are missing"
    status = path.stat()
    return _damage_of_file(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _damage_of_file(path: Path, modified: int, size: int) -> str | None:
    if not zipfile.is_zipfile(path):
        return "torn, or no checkpoint" if size else "an empty file"
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError) as error:
        return one_line(error)
    return None if corrupt is None else f"the checksum of its part {corrupt} is wrong"


def write_folders_whole(strategy: Any) -> None:
    """Have a strategy that writes a checkpoint as a folder write it beside its final name, and rename it when whole."""
    save = strategy.save_checkpoint

    def save_whole(checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(strategy.broadcast(filepath))
        partial, earlier = (path.with_name(f"{path.name}.{kind}") for kind in ("partial", "earlier"))
        if strategy.is_global_zero:
            _remove(partial)
        strategy.barrier()
        save(checkpoint, partial, storage_options)
        strategy.barrier()
        if strategy.is_global_zero:
            for part in (*partial.rglob("*"), partial):
                put_on_disk(part)
            if path.exists():
                path.replace(earlier)
            partial.replace(path)
            put_on_disk(path.parent)
            _remove(earlier)
        strategy.barrier()

    strategy.save_checkpoint = save_whole


def _remove(path: Path) -> None:
    """Remove a file, a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
