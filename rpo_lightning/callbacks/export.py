"""Saves the policy as an ordinary Hugging Face folder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from rpo_lightning.callbacks.run_folder import FinalFilesCallback
from rpo_lightning.core.run_files import POLICY_FOLDER
from rpo_lightning.policy.export import require_room

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)


class HuggingFaceExportCallback(FinalFilesCallback):
    """Writes ``<run>/policy`` at the end, and ``<run>/policy-step=N`` on the way if asked.

    Args:
        every_n_steps: Also export after every so many updates.
        merged: Merge an adapter into the weights; otherwise it is written alone, as PEFT does.
    """

    def __init__(self, every_n_steps: int | None = None, merged: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.merged = merged
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Count from where the run begins or goes on, and look at the folder before there is anything to lose."""
        if self.leaves_files(trainer):
            require_room(pl_module.loaded_policy, self.folder / POLICY_FOLDER, self.merged, pl_module.ranks)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export on the way: after the iteration that made the update in question, or went past it."""
        step = trainer.global_step
        if self.every_n_steps and step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._export(trainer, pl_module, f"{POLICY_FOLDER}-step={step}")
        self._last_step = step

    def write_final_files(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Export the final policy."""
        self._export(trainer, pl_module, POLICY_FOLDER)

    def _export(self, trainer: Trainer, module: RPOModule, name: str) -> None:
        if not self.leaves_files(trainer):
            return
        folder = self.folder / name
        module.save_pretrained(folder, self.merged)
        if trainer.is_global_zero:
            log.info(f"saved the policy to {folder}")
