"""The base of commands that need a policy and data.

They take the very arguments of ``fit``, ``--config`` included, and add their own. They run through
``Trainer.predict``, without the callbacks, loggers and checkpoints of a training run.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rpo_lightning.callbacks.progress import AnswerProgressCallback
from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.datamodule import RPODataModule, hub_split
from rpo_lightning.data.sources import as_source
from rpo_lightning.module import RPOModule


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
