"""Tells the data module what groups were like, for ``data.selection``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.data.selection import QuestionOutcome

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


class QuestionOutcomesCallback(Callback):
    """Hands the outcomes of every iteration, trained on or not, to the selection of training questions."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give all ranks the outcomes of all ranks; a collective."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, RPODataModule) or data.selected is None:
            return
        mine = [QuestionOutcome.of(group) for group in pl_module.groups]
        for of_rank in pl_module.ranks.gather(mine):
            data.selected.observe(of_rank)
        pl_module.log("rollout/uniform_informative_share", data.selected.uniform_share, batch_size=len(batch))
