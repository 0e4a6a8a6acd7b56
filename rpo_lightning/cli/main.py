"""The entry point of ``rpo-lightning``: the table of commands beside Lightning's own, and how errors end."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from rpo_lightning.cli.cache.commands import cache
from rpo_lightning.cli.lightning_cli import RPOCLI, RunConfigCallback
from rpo_lightning.cli.memory.command import memory
from rpo_lightning.cli.report.report import report
from rpo_lightning.cli.segments.command import segments
from rpo_lightning.core.errors import RPOError
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "segments": segments,
    "cache": cache,
    "report": report,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that users can mend end it with one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of the user's own, as with python -m
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, while weights are loaded
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rpo_lightning").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").addFilter(_to_stderr)  # what a command prints, such as a config, may be read again
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails is told in the end
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
            save_config_callback=RunConfigCallback,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            parser_kwargs={"description": f"Lightning's commands; beside them: {', '.join(COMMANDS)}"},
            args=arguments,
        )
    except Exception as error:
        mendable = _find_mendable(error)
        if mendable is None:
            raise
        print(f"rpo-lightning: error: {str(mendable).strip()}", file=sys.stderr)
        raise SystemExit(2) from error


def _to_stderr(record: logging.LogRecord) -> bool:
    """Have a logger that is made later write there; a filter is there before the handlers are."""
    for handler in logging.getLogger(record.name).handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return True


def _find_mendable(error: BaseException | None) -> BaseException | None:
    """The error that a user can mend, which the argument parser may have wrapped in others."""
    while error is not None and not isinstance(error, RPOError | MisconfigurationException):
        error = error.__cause__ or error.__context__
    return error
