"""The command line: LightningCLI over ``RPOModule`` and ``RPODataModule``.

``cache:`` is the one key that makes a GRPO or DAPO run an RPO run; left out or ``null``, rollouts take
the full path.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from rpo_lightning.callbacks import (
    CompletionsCallback,
    EvaluationResultsCallback,
    ExperienceCacheCallback,
    HuggingFaceExportCallback,
    PredictionsCallback,
    RunSummaryCallback,
)
from rpo_lightning.callbacks.run_folder import last_checkpoint, run_folder
from rpo_lightning.cli.parser import RPOArgumentParser
from rpo_lightning.core.errors import ConfigurationError

log = logging.getLogger(__name__)

# Whole numbers given for these arrive as floats, of which 1.0 means all.
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")


class RPOCLI(LightningCLI):
    """LightningCLI with an optional experience cache and the callbacks every run wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_class": RPOArgumentParser, **kwargs})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``cache`` (optional) and the settings of the callbacks that are always there."""
        parser.add_argument("--cache", type=ExperienceCacheCallback | None, default=None)
        # In the order in which they are called at the end: the summary lists what others have written.
        parser.add_lightning_class_args(HuggingFaceExportCallback, "export")
        parser.add_lightning_class_args(RunSummaryCallback, "summary")
        parser.add_lightning_class_args(CompletionsCallback, "completions")
        parser.add_lightning_class_args(PredictionsCallback, "predictions")
        parser.add_lightning_class_args(EvaluationResultsCallback, "results")
        parser.set_defaults({"trainer.log_every_n_steps": 1})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, but for the table that it would print beside ours."""
        skipped = LightningCLI.subcommands()
        for name in ("validate", "test"):
            skipped[name].add("verbose")
        return skipped

    def validate(self, **kwargs: Any) -> None:
        """Answer the validation questions."""
        self.trainer.validate(verbose=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Answer the test questions."""
        self.trainer.test(verbose=False, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put the cache callback first: it records groups before others look at the cache."""
        if self._get(self.config_init, "trainer.enable_progress_bar") is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        for name in _LIMITS:
            if self._get(self.config_init, f"trainer.{name}") == 1.0:
                log.warning(
                    f"trainer.{name}: 1 is read as 1.0, which is all batches; use 2 and batches of half the size"
                )
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigurationError(f"trainer: {str(error).splitlines()[0]}") from error
        _refuse_automatic_optimization(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and cast(Any, trainer).fast_dev_run:
                callback.save_last = False  # Lightning 2.6 saves it after a trial run too
        self._find_checkpoint(trainer)
        cache = self._get(self.config_init, "cache")
        if cache is not None:
            cast(Any, trainer).callbacks.insert(0, cache)
        return trainer

    def _find_checkpoint(self, trainer: Trainer) -> None:
        """Have ``last`` mean the newest last checkpoint of this experiment: a new run has a folder of its own.

        Raises:
            ConfigurationError: A checkpoint that is named is not there.
        """
        path = self._get(self.config_init, "ckpt_path")
        if path == "last":
            found = last_checkpoint(trainer)
            if found is None:
                log.warning("--ckpt_path last: there is none yet, the run starts from the beginning")
            else:
                log.info(f"--ckpt_path last: {found}")
                self.config_init[self.subcommand]["ckpt_path"] = str(found)
        elif path not in (None, "best", "hpc", "registry") and "://" not in path and not Path(path).exists():
            raise ConfigurationError(f"--ckpt_path {path}: no such file")


class RunConfigCallback(SaveConfigCallback):
    """Saves the config into the run's folder, which Lightning knows of its own loggers alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look the folder up, on all ranks, and save."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / self.config_filename
        self.parser.save(self.config, str(path), skip_none=False, overwrite=self.overwrite, multifile=self.multifile)


def _refuse_automatic_optimization(trainer: Trainer) -> None:
    """Name what takes the place of settings that go with automatic optimisation only.

    Raises:
        ConfigurationError: One of them is set.
    """
    for name, unset, instead in (
        ("gradient_clip_val", (None, 0), "model.update.max_grad_norm"),
        (
            "accumulate_grad_batches",
            (1,),
            "data.batch_size for the batch and model.update.micro_batch_tokens for its parts",
        ),
    ):
        if getattr(trainer, name) not in unset:
            raise ConfigurationError(f"trainer.{name} has no effect on this module: use {instead}")
