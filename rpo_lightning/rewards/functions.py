"""Rewards written by the user, named by import path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import Reward


def import_function(path: str) -> Callable[..., Any]:
    """Import ``package.module.function``; modules in the working directory are found too.

    Raises:
        ConfigurationError: No such module or function, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigurationError(f"{path!r} is not an import path such as my_package.grading.my_reward")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"cannot import the function {path!r}: {error}") from error
    if not callable(function):
        raise ConfigurationError(f"{path!r} is not callable")
    return function


class FunctionReward(Reward):
    """A user's function ``f(prompt, response, answer) -> float``, run in a worker process.

    Args:
        function: Import path, e.g. ``my_package.rewards.brevity``.
        weight: Factor of the term in the sum.
    """

    def __init__(self, function: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.function = function
        self.response_function = import_function(function)

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2]

    def score(self, group: Sequence[Sample]) -> list[float]:
        """The function's values, computed in this process."""
        assert self.response_function is not None
        return [float(self.response_function(s.prompt, s.response, s.answer)) for s in group]
