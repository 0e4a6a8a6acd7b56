"""Saves the policy as a Hugging Face folder when training ends, and during training if asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from rpo_lightning.callbacks.run_folder import FinalFilesCallback
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.run_files import POLICY_FOLDER
from rpo_lightning.policy.export import require_room

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


class HuggingFaceExportCallback(FinalFilesCallback):
    """Saves the final policy to ``policy`` in the run's folder, and earlier ones to ``policy-step=N``.

    Args:
        every_n_steps: Also save a policy after every so many updates.
        merged: Merge an adapter into the weights. Otherwise the adapter is saved alone, as PEFT saves it.
    """

    def __init__(self, every_n_steps: int | None = None, merged: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(f"export.every_n_steps must be at least 1 (null: never), got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.merged = merged
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Check the folder before training starts, and note the number of updates so far.

        Raises:
            ConfigurationError: The folder holds an adapter, and a whole policy would be saved, or the other way round.
        """
        if self.leaves_files(trainer):
            require_room(pl_module.loaded_policy, self.folder / POLICY_FOLDER, self.merged, pl_module.ranks)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the policy if this iteration's updates reached a multiple of ``every_n_steps``, or went past it."""
        step = trainer.global_step
        if self.every_n_steps and step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._export(trainer, pl_module, f"{POLICY_FOLDER}-step={step}")
        self._last_step = step

    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Save the final policy."""
        final = self.folder / POLICY_FOLDER  # earlier ones are not made up for
        self.unwritten.causes = {path: cause for path, cause in self.unwritten.causes.items() if path == final}
        self._export(trainer, pl_module, POLICY_FOLDER)

    def _export(self, trainer: Trainer, module: RPOModule, name: str) -> None:
        if not self.leaves_files(trainer):
            return
        folder = self.folder / name
        with self.unwritten.goes_on(folder, "every checkpoint holds the policy too"):
            module.save_pretrained(folder, self.merged)
            if trainer.is_global_zero:
                log.info(f"saved the policy to {folder}")
