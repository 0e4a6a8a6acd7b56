"""``rpo-lightning fit``, ``validate``, ``test`` and ``predict``: LightningCLI over ``RPOModule`` and ``RPODataModule``.

The key ``cache`` makes a GRPO or DAPO run an RPO run. Without it, or with ``null``, rollouts take the full path.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
)
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
from rpo_lightning.callbacks.run_folder import require_final_files, run_folder
from rpo_lightning.cli.checkpoints import found_checkpoint, reading, require_fitting
from rpo_lightning.cli.commands import LIGHTNING_COMMANDS
from rpo_lightning.cli.config_files import require_config_files, require_numbers
from rpo_lightning.cli.lightning_parser import RPOArgumentParser
from rpo_lightning.cli.parser import of_chosen_class
from rpo_lightning.core.errors import ConfigurationError, one_line, own_cause
from rpo_lightning.core.files import replacing, require_place
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)

# Callbacks that drive automatic optimisation, and what to set instead.
_OF_AUTOMATIC_OPTIMISATION: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "data.batch_size for the batch and model.update.micro_batch_tokens for its parts",
    BatchSizeFinder: "data.batch_size and model.update.micro_batch_tokens; rpo-lightning memory estimates what fits",
    LearningRateFinder: "model.optimizer",
    BaseFinetuning: "model.adapter to train less than all weights",
}
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
            **{name: {"command": name, "description": LIGHTNING_COMMANDS[name]} for name in _asked_for(arguments)},
        },
        args=arguments,
    )


def _asked_for(arguments: list[str]) -> list[str]:
    """The command that arguments begin with; all of Lightning's if they begin with an option."""
    return [name for name in LIGHTNING_COMMANDS if name in arguments[:1]] or list(LIGHTNING_COMMANDS)


class RPOCLI(LightningCLI):
    """LightningCLI with an optional experience cache and the callbacks of every run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()  # of transformers, while weights are loaded
        given = kwargs.get("args")
        self._arguments: list[str] = given if isinstance(given, list) else []
        self._checkpoint: str | None = None
        # Nothing asks for the settings of a checkpoint: they come from the command line again.
        without = {"load_from_checkpoint_support": False}
        super().__init__(*args, **{"parser_class": RPOArgumentParser, **without, **kwargs})

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
        require_config_files(self._arguments)
        self.config = parser.parse_args(args)
        require_numbers(self.config.as_dict().get(self.config.get("subcommand"), self.config.as_dict()))

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's reads the whole checkpoint, and takes settings of the model from it."""

    @override
    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
        super()._set_seed()

    def subcommands(self) -> dict[str, set[str]]:
        """Lightning's; only the one that is asked for, since the parser of each takes time to make.

        They lack the table that Lightning prints of an evaluation, since ``EvaluationResultsCallback`` prints one, and
        the choice to run code that a checkpoint holds.
        """
        skipped = LightningCLI.subcommands()
        return {name: {*skipped[name], "verbose", "weights_only"} for name in _asked_for(self._arguments)}

    def fit(self, **kwargs: Any) -> None:
        """Train. Checkpoints are read without running what they hold, here and below."""
        with reading(self._checkpoint):
            self.trainer.fit(weights_only=True, **kwargs)

    def after_fit(self) -> None:
        """End with an error if a file that a run leaves could not be written."""
        require_final_files(self.trainer)

    def validate(self, **kwargs: Any) -> None:
        """Answer the validation questions, without Lightning's table."""
        with reading(self._checkpoint):
            self.trainer.validate(verbose=False, weights_only=True, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Answer the test questions, without Lightning's table."""
        with reading(self._checkpoint):
            self.trainer.test(verbose=False, weights_only=True, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Answer questions."""
        with reading(self._checkpoint):
            self.trainer.predict(weights_only=True, **kwargs)

    @override
    def instantiate_classes(self) -> None:
        """Make the classes, and look at the files of policy and checkpoint before data is read.

        Raises:
            ConfigurationError: A class refuses its settings, the policy cannot be loaded, or the checkpoint is of
                another one.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser's own, which has tried all alternatives of a type and forgotten their errors.
            if own_cause(error) is not None or "Given value" not in str(error):
                raise
            raise ConfigurationError(of_chosen_class(str(error))) from error
        self.model.require_policy()
        cache = self._get(self.config_init, "cache") if self.subcommand == "fit" else None
        require_fitting(self._checkpoint, self.model, cache)

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
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ConfigurationError(f"trainer: {one_line(error)}") from error
        _refuse_automatic_optimization(trainer)
        for place in {trainer.default_root_dir, *(logger.save_dir for logger in trainer.loggers)} - {None}:
            if "://" not in str(place):
                require_place(str(place), "trainer.default_root_dir or the logger's save_dir", is_folder=True)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and cast(Any, trainer).fast_dev_run:
                callback.save_last = False  # Lightning 2.6 saves it even after a trial run
        cache = self._get(self.config_init, "cache")
        if self.subcommand is not None:
            self._checkpoint = found_checkpoint(
                trainer, self._get(self.config_init, "ckpt_path"), self.subcommand == "fit", cache
            )
            self.config_init[self.subcommand]["ckpt_path"] = self._checkpoint
        if cache is not None:
            cast(Any, trainer).callbacks.insert(0, cache)
        if in_lines:
            cast(Any, trainer).callbacks.append(ProgressLinesCallback())
        elif not has_bar:
            _replace_bar(trainer)
        return trainer


class RunConfigCallback(SaveConfigCallback):
    """Saves the config into the run's folder. Lightning's only knows the folders of Lightning's loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look the folder up on all ranks, and save the config."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder."""
        with replacing(self._folder / self.config_filename) as partial:
            self.parser.save(self.config, str(partial), skip_unset=False, overwrite=True, multifile=self.multifile)


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
        ConfigurationError: One of them is set, or one would stop the run in its first epoch.
    """
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise ConfigurationError(
            f"trainer.check_val_every_n_epoch must be at least 1, got {trainer.check_val_every_n_epoch}"
        )
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
    for callback in cast(Any, trainer).callbacks:
        for kind, instead in _OF_AUTOMATIC_OPTIMISATION.items():
            if isinstance(callback, kind):
                raise ConfigurationError(
                    f"trainer.callbacks: {type(callback).__name__} does not work on this module: use {instead}"
                )
