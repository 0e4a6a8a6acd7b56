"""Config files and their values, looked at before the argument parser reads them: its messages do not name the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode

from rpo_lightning.core.errors import ConfigurationError

_OPTIONS = ("--config", "-c")


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, where YAML's own takes the last one."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for key, _ in node.value if names.count(key.value) > 1), None)
        if twice is not None:
            raise ConstructorError(None, None, f"the key {twice.value!r} comes twice", twice.start_mark)
        return super().construct_mapping(node, deep)


def require_config_files(arguments: Sequence[str]) -> None:
    """Check the config files that arguments name.

    Raises:
        ConfigurationError: A file is missing, is no YAML, or holds no settings.
    """
    for name in _named(arguments):
        if not name.lstrip().startswith("{"):  # settings themselves may stand for a file
            _require_settings(Path(name))


def _named(arguments: Sequence[str]) -> Iterator[str]:
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _OPTIONS and equals:
            yield value
        elif option in _OPTIONS and number + 1 < len(arguments):
            yield arguments[number + 1]


def _require_settings(path: Path) -> None:
    if not path.is_file():
        problem = "a folder: name a file in it" if path.is_dir() else "no such file: check the path"
        raise ConfigurationError(f"--config {path}: {problem}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--config {path}: not UTF-8 ({error.reason}): save the file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise ConfigurationError(f"--config {path}{where}: {problem}: mend the line") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"--config {path}: no YAML that can be read: mend the file") from error
    if not isinstance(found, Mapping):
        held = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigurationError(f"--config {path}: holds {held} where settings are expected, as in configs/")


def require_numbers(settings: Any, name: str = "") -> None:
    """Check that no setting is NaN: every comparison with it is false, so it would slip through other checks.

    Args:
        settings: Parsed settings.
        name: What they are called.

    Raises:
        ConfigurationError: A setting is NaN.
    """
    if isinstance(settings, float) and math.isnan(settings):
        raise ConfigurationError(f"{name} is NaN: give a number")
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            own = name if key in ("class_path", "init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
            require_numbers(value, own)
    elif isinstance(settings, list | tuple):
        for value in settings:
            require_numbers(value, name)
