"""Keeps the rollout engine's weights equal to the policy's.

The module counts versions of its policy, the engine remembers the version it holds. Before anything
is generated (training batch, validation, test, prediction, start and resume included) the callback
compares the two and syncs where they differ: exactly one sync for each change, however many updates a
rollout is trained on. A run that ends in an exception leaves no engine behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule


def sync_engine(trainer: Trainer) -> None:
    """Have the trainer's weight-sync callback sync now, for callbacks that generate in ``on_train_start``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightSyncCallback):
            callback.sync(cast("RPOModule", trainer.lightning_module))


class WeightSyncCallback(Callback):
    """Loads the policy into the engine whenever it has changed. ``RPOModule`` brings one itself.

    Attributes:
        syncs: Number of syncs so far.
    """

    def __init__(self) -> None:
        self.syncs = 0

    def sync(self, module: RPOModule) -> None:
        """Sync if the engine is behind; wake it in any case."""
        with module.timer("sync"):
            if module.engine.weights_version == module.policy_version:
                module.engine.wake()
                return
            module.engine.load_weights(module.loaded_policy, module.policy_version)
        self.syncs += 1

    def on_train_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Before the cache is initialised."""
        self.sync(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: RPOModule, batch: Any, batch_idx: int) -> None:
        """Before a rollout."""
        self.sync(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Before validation, the sanity check included."""
        self.sync(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Before testing."""
        self.sync(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Before prediction."""
        self.sync(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """Release engine and grading processes: after an exception Lightning calls no ``teardown``."""
        pl_module.release()
