"""Keeps the rollout engine's weights equal to the policy's.

The module counts versions of its policy, and the engine remembers the version that it holds. The callback compares them
before anything is generated: in training, validation, test and prediction, also after a resume. If they differ, it
syncs once, however many updates were made. A run that ends in an exception leaves no engine behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


def sync_engine(trainer: Trainer) -> None:
    """Sync the engine at once. Callbacks that generate in ``on_train_start`` call this first."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightSyncCallback):
            callback.sync(cast("RPOModule", trainer.lightning_module))


class WeightSyncCallback(Callback):
    """Loads the policy into the engine after it changed. ``RPOModule`` adds this callback itself.

    Attributes:
        syncs: Number of syncs so far.
    """

    def __init__(self) -> None:
        self.syncs = 0

    def sync(self, module: RPOModule) -> None:
        """Wake the engine, and load the policy if the engine holds an older version."""
        with module.timer("sync"):
            if module.engine.weights_version == module.policy_version:
                module.engine.wake()
                return
            module.engine.load_weights(module.loaded_policy, module.policy_version)
        self.syncs += 1

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Sync before the cache is filled."""
        self.sync(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: RPOModule, batch: Any, batch_idx: int) -> None:
        """Sync before a rollout."""
        self.sync(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Sync before a validation or the sanity check."""
        self.sync(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Sync before a test."""
        self.sync(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Sync before a prediction."""
        self.sync(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """Release the engine and the grading processes, because Lightning skips ``teardown`` after an exception."""
        pl_module.release()
