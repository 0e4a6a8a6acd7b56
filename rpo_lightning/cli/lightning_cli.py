"""``rpo-lightning fit``, ``validate``, ``test`` and ``predict``: LightningCLI over ``RPOModule`` and ``RPODataModule``.

The key ``cache`` makes a GRPO or DAPO run an RPO run. Without it, or with ``null``, rollouts take the full path.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from rpo_lightning.callbacks import (
    CompletionsCallback,
    EvaluationResultsCallback,
    ExperienceCacheCallback,
    HuggingFaceExportCallback,
    PredictionsCallback,
    ProgressLinesCallback,
    RunProgressBar,
    RunSummaryCallback,
)
from rpo_lightning.callbacks.run_folder import last_checkpoint, run_folder
from rpo_lightning.cli.commands import LIGHTNING_COMMANDS
from rpo_lightning.cli.lightning_parser import RPOArgumentParser
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)

# Whole numbers given for these arrive as floats, and 1.0 means all.
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")


def run(arguments: list[str]) -> None:
    """Run one of Lightning's commands."""
    RPOCLI(
        RPOModule,
        RPODataModule,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=RunConfigCallback,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        parser_kwargs={
            "prog": "rpo-lightning",
            **{name: {"command": name, "description": text} for name, text in LIGHTNING_COMMANDS.items()},
        },
        args=arguments,
    )


class RPOCLI(LightningCLI):
    """LightningCLI with an optional experience cache and the callbacks of every run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()  # of transformers, while weights are loaded
        super().__init__(*args, **{"parser_class": RPOArgumentParser, **kwargs})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``cache`` and the settings of the callbacks of every run."""
        parser.add_argument(
            "--cache",
            type=ExperienceCacheCallback | None,
            default=None,
            help="The experience cache; none if not given.",
        )
        # They are called in this order at the end. The summary lists what the others have written.
        parser.add_lightning_class_args(HuggingFaceExportCallback, "export")
        parser.add_lightning_class_args(RunSummaryCallback, "summary")
        parser.add_lightning_class_args(CompletionsCallback, "completions")
        parser.add_lightning_class_args(PredictionsCallback, "predictions")
        parser.add_lightning_class_args(EvaluationResultsCallback, "results")
        parser.set_defaults({"trainer.log_every_n_steps": 1})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's warns of any arguments beside those of the process. Here they come from one place.
        self.config = parser.parse_args(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the table that it prints of an evaluation: ``EvaluationResultsCallback`` prints one."""
        skipped = LightningCLI.subcommands()
        for name in ("validate", "test"):
            skipped[name].add("verbose")
        return skipped

    def validate(self, **kwargs: Any) -> None:
        """Answer the validation questions, without Lightning's table."""
        self.trainer.validate(verbose=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Answer the test questions, without Lightning's table."""
        self.trainer.test(verbose=False, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the cache and the progress bar before its other callbacks.

        The cache takes the groups of an iteration before others look at it, and the bar closes before others print.

        Raises:
            ConfigurationError: The trainer refuses a setting, or a setting has no effect on the module.
        """
        in_lines = self._get(self.config_init, "trainer.enable_progress_bar") is None and not sys.stdout.isatty()
        if in_lines:
            kwargs["enable_progress_bar"] = False
        given = self._get(self.config_init, "trainer.callbacks") or []
        has_bar = any(isinstance(c, ProgressBar) for c in (given if isinstance(given, list) else [given]))
        for name in _LIMITS:
            if self._get(self.config_init, f"trainer.{name}") == 1.0:
                log.warning(
                    f"trainer.{name}: 1 is read as 1.0, which means all batches; use 2 and batches of half the size"
                )
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigurationError(f"trainer: {str(error).splitlines()[0]}") from error
        _refuse_automatic_optimization(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and cast(Any, trainer).fast_dev_run:
                callback.save_last = False  # Lightning 2.6 saves it even after a trial run
        self._find_checkpoint(trainer)
        cache = self._get(self.config_init, "cache")
        if cache is not None:
            cast(Any, trainer).callbacks.insert(0, cache)
        if in_lines:
            cast(Any, trainer).callbacks.append(ProgressLinesCallback())
        elif not has_bar:
            _replace_bar(trainer)
        return trainer

    def _find_checkpoint(self, trainer: Trainer) -> None:
        """Find the newest last checkpoint of this experiment for ``last``, since each run has its own folder.

        Raises:
            ConfigurationError: There is no file at a given path.
        """
        path = self._get(self.config_init, "ckpt_path")
        if path == "last":
            found = last_checkpoint(trainer)
            if found is None:
                log.warning("--ckpt_path last: there is none yet, so no checkpoint is loaded")
            else:
                log.info(f"--ckpt_path last: {found}")
            self.config_init[self.subcommand]["ckpt_path"] = None if found is None else str(found)
        elif path not in (None, "best", "hpc", "registry") and "://" not in path and not Path(path).exists():
            raise ConfigurationError(f"--ckpt_path {path}: no such file")


class RunConfigCallback(SaveConfigCallback):
    """Saves the config into the run's folder. Lightning's only knows the folders of Lightning's loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look the folder up on all ranks, and save the config."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / self.config_filename
        self.parser.save(self.config, str(path), skip_unset=False, overwrite=self.overwrite, multifile=self.multifile)


def _replace_bar(trainer: Trainer) -> None:
    """Put ``RunProgressBar`` in the place of the progress bar that Lightning chose, if it chose one."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        callbacks = cast(Any, trainer).callbacks
        callbacks.remove(bar)
        callbacks.insert(0, RunProgressBar())


def _refuse_automatic_optimization(trainer: Trainer) -> None:
    """Refuse settings that only automatic optimisation reads, and name what to set instead.

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
