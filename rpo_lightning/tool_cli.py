"""Commands beside Lightning's own: ``segments``, ``cache …``, ``report``, ``memory``.

Those that need a policy and data take the very arguments of ``fit``, ``--config`` included, and add their own.
They run through ``Trainer.predict``, without the callbacks, loggers and checkpoints of a training run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rpo_lightning.cache_commands import (
    BuildCacheCallback,
    ExportSettings,
    ImportSettings,
    export,
    import_,
    show,
    stats,
)
from rpo_lightning.callbacks.progress import AnswerProgressCallback
from rpo_lightning.cli import RPOCLI
from rpo_lightning.data import RPODataModule, hub_split
from rpo_lightning.errors import ConfigurationError
from rpo_lightning.module import RPOModule
from rpo_lightning.sources import as_source


class ToolCLI(RPOCLI):
    """Parses what ``fit`` parses, and the arguments of one more class beside it.

    Args:
        name: Name of the command.
        model_class: The module.
        added_class: A callback, or a class that holds settings.
        arguments: Command-line arguments after the name.

    Attributes:
        added: The instance of ``added_class``.
    """

    def __init__(self, name: str, model_class: type[RPOModule], added_class: type, arguments: list[str]) -> None:
        self._name = name
        self._added_class = added_class
        self.added: Any = None
        super().__init__(
            model_class,
            RPODataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"rpo-lightning {name}"},
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(self._added_class, None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that predicts and does nothing else."""
        trainer: Any = super().instantiate_trainer(**kwargs)
        names = inspect.signature(self._added_class).parameters
        self.added = self._added_class(**{name: self._get(self.config_init, name) for name in names})
        trainer.callbacks = [AnswerProgressCallback(self._name)]
        trainer.callbacks += [self.added] if isinstance(self.added, Callback) else []
        trainer.loggers = []
        return cast(Trainer, trainer)

    def predict_on(self, *splits: str) -> None:
        """Predict on the first of these splits that is set, in the order of its rows."""
        sources = self.datamodule.sources
        chosen = next((s for s in splits if sources[s]), None)
        if chosen is None:
            raise ConfigurationError(f"none of {', '.join(f'data.{s}' for s in splits)} is set")
        data = sources[chosen]
        if isinstance(data, dict):
            raise ConfigurationError(f"data.{chosen} has several sets; this command takes one")
        sources["predict"] = as_source(data, hub_split(chosen))
        self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)


def segments(arguments: list[str]) -> None:
    """Take reasoning paths apart: accuracy after cuts, similarity of beginnings."""
    from rpo_lightning.analysis.segment_results import SegmentResultsCallback
    from rpo_lightning.analysis.segments import SegmentAnalysis

    cli = ToolCLI("segments", SegmentAnalysis, SegmentResultsCallback, arguments)
    cli.predict_on("predict", "val", "train")


_CACHE_HELP = """usage: rpo-lightning cache COMMAND ...

  build    sample the policy's answers to the training questions (arguments of fit)
  import   make a cache of responses from elsewhere (arguments of fit)
  export   write a cache as a table with text (arguments of fit)
  show     print entries with what a cut keeps of them
  stats    print statistics

COMMAND --help lists its arguments."""


def cache(arguments: list[str]) -> None:
    """Build, look at, export and import experience caches."""
    if arguments[:1] == ["build"]:
        cli = ToolCLI("cache build", RPOModule, BuildCacheCallback, arguments[1:])
        settings = cli.config_init.get("cache")
        if settings is not None:
            cli.model.eval_samples = settings.initial_samples
            cli.model.eval_sampling = settings.initial_sampling or cli.model.sampling
            cli.added.keep_unfinished = cli.added.keep_unfinished or settings.keep_unfinished
        cli.predict_on("train")
    elif arguments[:1] == ["export"]:
        cli = ToolCLI("cache export", RPOModule, ExportSettings, arguments[1:])
        export(cli.added, cli.model, cli.datamodule)
    elif arguments[:1] == ["import"]:
        cli = ToolCLI("cache import", RPOModule, ImportSettings, arguments[1:])
        import_(cli.added, cli.model, cli.datamodule)
    elif arguments[:1] in (["show"], ["stats"]):
        auto_cli(
            {"show": show, "stats": stats},
            as_positional=False,
            args=arguments,
            prog="rpo-lightning cache",
        )
    elif arguments[:1] in (["-h"], ["--help"]):
        print(_CACHE_HELP)
    else:
        raise ConfigurationError(f"cache {' '.join(arguments[:1])}: no such command\n{_CACHE_HELP}")


def report(arguments: list[str]) -> None:
    """Write the page of a run."""
    from rpo_lightning.analysis.report import write_report

    auto_cli(write_report, args=arguments, prog="rpo-lightning report")


def memory(arguments: list[str]) -> None:
    """Estimate the memory that a config needs."""
    from rpo_lightning.memory.command import memory as estimate_memory

    estimate_memory(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "segments": segments,
    "cache": cache,
    "report": report,
    "memory": memory,
}
