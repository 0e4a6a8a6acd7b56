"""The base of commands that need a policy and data.

They take the arguments of ``fit``, ``--config`` among them, and some of their own. They run ``Trainer.predict`` without
the callbacks, loggers and checkpoints of a training run.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.callbacks.answer_progress import AnswerProgressCallback
from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.cli.lightning_parser import RPOArgumentParser
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.data.question_sets import hub_split
from rpo_lightning.data.sources import as_source
from rpo_lightning.module import RPOModule


class ToolCLI(RPOCLI):
    """Parses the arguments of ``fit`` and those of one more class.

    Args:
        name: Name of the command.
        description: Its line of help.
        model_class: The module.
        added_class: A callback, or a class that holds settings.
        arguments: Command-line arguments after the name.

    Attributes:
        added: The instance of ``added_class``.
    """

    def __init__(
        self, name: str, description: str, model_class: type[RPOModule], added_class: type, arguments: list[str]
    ) -> None:
        self._name = name
        self._added_class = added_class
        of_fit = inspect.signature(RPOModule).parameters
        self._own_settings = {
            *inspect.signature(added_class).parameters,
            *(f"model.{setting}" for setting in inspect.signature(model_class).parameters if setting not in of_fit),
        }
        self.added: Any = None
        super().__init__(
            model_class,
            RPODataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"rpo-lightning {name}", "command": name, "description": description},
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the command."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(self._added_class, None)
        cast(RPOArgumentParser, parser).add_own(self._own_settings)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer that predicts and does nothing else."""
        trainer: Any = super().instantiate_trainer(**kwargs)
        names = inspect.signature(self._added_class).parameters
        self.added = self._added_class(**{name: self._get(self.config_init, name) for name in names})
        trainer.callbacks = [AnswerProgressCallback(self._name)]
        trainer.callbacks += [self.added] if isinstance(self.added, Callback) else []
        trainer.loggers = []
        return cast(Trainer, trainer)

    @property
    def cache_settings(self) -> ExperienceCacheCallback | None:
        """The config's cache; ``None`` without one."""
        return cast("ExperienceCacheCallback | None", self._get(self.config_init, "cache"))

    def predict_on(self, *splits: str) -> None:
        """Predict on the first of these splits that is set, in the order of its rows.

        Raises:
            ConfigurationError: None of them is set, or it has several sets.
        """
        sources = self.datamodule.sources
        chosen = next((s for s in splits if sources[s]), None)
        if chosen is None:
            names = [f"data.{split}" for split in splits]
            if len(names) > 1:
                raise ConfigurationError(f"none of {', '.join(names)} is set: set one")
            raise ConfigurationError(f"{names[0]} is not set: set it to the questions")
        data = sources[chosen]
        if isinstance(data, dict):
            raise ConfigurationError(
                f"data.{chosen} has several sets and this command takes one: set it to one of them"
            )
        sources["predict"] = as_source(data, hub_split(chosen))
        self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
