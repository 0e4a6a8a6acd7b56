"""Which settings there are: those of the command line's parser, and those of the classes that can be chosen."""

from __future__ import annotations

import inspect
import typing
from functools import cache
from typing import Any

from lightning.pytorch import Trainer

from rpo_lightning.callbacks import (
    CompletionsCallback,
    EvaluationResultsCallback,
    ExperienceCacheCallback,
    HuggingFaceExportCallback,
    PredictionsCallback,
    RunSummaryCallback,
)
from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.cli.segments.analysis import SegmentAnalysis
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule
from tests.documents import ROOT

SECTIONS: dict[str, list[type]] = {
    "model": [RPOModule, SegmentAnalysis],
    "data": [RPODataModule],
    "cache": [ExperienceCacheCallback],
    "trainer": [Trainer],
    "export": [HuggingFaceExportCallback],
    "summary": [RunSummaryCallback],
    "completions": [CompletionsCallback],
    "predictions": [PredictionsCallback],
    "results": [EvaluationResultsCallback],
}


@cache
def parsed() -> set[str]:
    """Every setting of the parser of a run without classes that are chosen, and every group of settings."""
    cli = RPOCLI(
        SegmentAnalysis,
        RPODataModule,
        run=False,
        args=["--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.logger", "false"],
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    names = list(cli.parser.get_defaults().keys())
    return {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}


def is_setting(key: str) -> bool:
    """Whether the parser knows a setting, or else a class that can be chosen on the way has a parameter so named."""
    if key in parsed():
        return True
    section, *names = key.split(".")
    owners = SECTIONS[section]
    is_key = False  # of a mapping, whose keys are the user's
    for depth, name in enumerate(names):
        if is_key:
            is_key = False
            continue
        if depth == 0 and section != "cache" and f"{section}.{name}" not in parsed():
            return False
        types = [of_owner[name] for owner in owners if name in (of_owner := _parameters(owner))]
        if not types:
            return False
        is_key = any(typing.get_origin(found) is dict for found in types)
        owners = [kind for found in types for kind in _classes_in(found)]
    return True


def settings_of(value: Any, key: str = "") -> set[str]:
    """Dotted names in a part of a config; the parameters of a user's own class are left out."""
    if isinstance(value, dict) and "class_path" in value:
        is_ours = key and "." not in value["class_path"]
        return settings_of(value.get("init_args", ""), key) if is_ours else {key} - {""}
    if isinstance(value, dict):
        return {name for k, v in value.items() for name in settings_of(v, f"{key}.{k}" if key else k)}
    return {key} - {""}


@cache
def _parameters(owner: type) -> dict[str, Any]:
    """Parameters of a class and its subclasses, with their types."""
    found: dict[str, Any] = {}
    for kind in (owner, *_subclasses(owner)):
        try:
            types = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
        except (NameError, TypeError):  # of somebody else's class, whose types are imported for checkers alone
            types = {}
        for name in inspect.signature(kind.__init__).parameters:  # type: ignore[misc]
            found.setdefault(name, types.get(name))
    return found


def _subclasses(owner: type) -> list[type]:
    return [below for kind in type.__subclasses__(owner) for below in (kind, *_subclasses(kind))]


def _classes_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        return [] if hint.__module__ == "builtins" else [hint]
    return [kind for part in typing.get_args(hint) for kind in _classes_in(part)]
