"""The loader of training prompts, which a resumed run can continue in the middle of an epoch, and what loaders need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from rpo_lightning.core.seeds import run_seed
from rpo_lightning.core.types import Prompt


class ResumableLoader(DataLoader[Prompt]):
    """A loader that Lightning can resume in the middle of an epoch.

    It skips the batches that the trainer's progress counts as done. It reads the progress when iteration begins, after
    a resumed trainer has restored it.

    Args:
        prompts: The data set.
        batches_done: Returns how many batches of the epoch have been trained on.
        kwargs: See ``DataLoader``.
    """

    def __init__(self, prompts: Sequence[Prompt], batches_done: Callable[[], int] = lambda: 0, **kwargs: Any) -> None:
        super().__init__(prompts, **kwargs)  # type: ignore[arg-type]
        self.batches_done = batches_done

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch. Lightning takes a loader for resumable only if it has this method."""
        return {"batches_done": self.batches_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing: the trainer restores its progress itself."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.batches_done()
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                yield batch


def batches_processed(trainer: Trainer) -> int:
    """The number of training batches of this epoch that were processed, those before a resume included."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)


def own_generator() -> torch.Generator:
    """What a loader draws from whenever it is iterated, and a resumed run iterates more often.

    Without one it is torch's global generator, which dropout and user code may use.
    """
    return torch.Generator().manual_seed(run_seed())
