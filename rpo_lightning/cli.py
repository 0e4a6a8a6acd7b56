"""The command line: LightningCLI over ``RPOModule`` and ``RPODataModule``.

``cache:`` is the one key that makes a GRPO or DAPO run an RPO run; left out or ``null``, rollouts take
the full path.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils.logging import disable_progress_bar

from rpo_lightning.callbacks import (
    CompletionsCallback,
    EvaluationResultsCallback,
    ExperienceCacheCallback,
    HuggingFaceExportCallback,
    PredictionsCallback,
    RunSummaryCallback,
)
from rpo_lightning.data import RPODataModule
from rpo_lightning.errors import RPOError
from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)

# Whole numbers given for these arrive as floats, of which 1.0 means all.
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")


class RPOCLI(LightningCLI):
    """LightningCLI with an optional experience cache and the callbacks every run wants."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``cache`` (optional) and the settings of the callbacks that are always there."""
        parser.add_argument("--cache", type=ExperienceCacheCallback | None, default=None)
        parser.add_lightning_class_args(RunSummaryCallback, "summary")
        parser.add_lightning_class_args(HuggingFaceExportCallback, "export")
        parser.add_lightning_class_args(CompletionsCallback, "completions")
        parser.add_lightning_class_args(PredictionsCallback, "predictions")
        parser.add_lightning_class_args(EvaluationResultsCallback, "results")
        parser.set_defaults({"trainer.log_every_n_steps": 1})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put the cache callback first: it records groups before others look at the cache."""
        if self._get(self.config_init, "trainer.enable_progress_bar") is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        for name in _LIMITS:
            if self._get(self.config_init, f"trainer.{name}") == 1.0:
                log.warning(
                    f"trainer.{name}: 1 is read as 1.0, which is all batches; use 2 and batches of half the size"
                )
        trainer = super().instantiate_trainer(**kwargs)
        cache = self._get(self.config_init, "cache")
        if cache is not None:
            cast(Any, trainer).callbacks.insert(0, cache)
        return trainer


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that users can mend end it with one line and exit code 2."""
    from rpo_lightning.tool_cli import COMMANDS

    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, while weights are loaded
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rpo_lightning").setLevel(logging.INFO)
    # Prompts are tokenised once and held in memory: loader workers would have nothing to do.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A checkpoint is to hold the policy after its update, which is what Lightning warns of here.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization.*")
    # It fears that arguments are given twice; here they come from one place.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    # vLLM leaves a process group of one; what is logged over an epoch is synced anyway.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True.*")
    try:
        if arguments[:1] and arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
            return
        RPOCLI(
            RPOModule,
            RPODataModule,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": f"Lightning's commands; beside them: {', '.join(COMMANDS)}"},
            args=arguments,
        )
    except Exception as error:
        mendable = _find_mendable(error)
        if mendable is None:
            raise
        print(f"rpo-lightning: error: {mendable}", file=sys.stderr)
        raise SystemExit(2) from error


def _find_mendable(error: BaseException | None) -> RPOError | None:
    """The error that a user can mend, which the argument parser may have wrapped in others."""
    while error is not None and not isinstance(error, RPOError):
        error = error.__cause__ or error.__context__
    return error
