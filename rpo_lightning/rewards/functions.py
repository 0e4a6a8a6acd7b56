"""Rewards written by the user as functions, named by import path or given as objects."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import os
import pickle
import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, cast

from rpo_lightning.core.errors import ConfigurationError, RewardError, one_line
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.arguments import Arguments, name_of
from rpo_lightning.rewards.base import Reward
from rpo_lightning.rewards.calls import FailedScore, collect_results
from rpo_lightning.rewards.pool import GradingPool
from rpo_lightning.rewards.serving import is_of_memory, told

OnError = Literal["stop", "zero"]


class _Killed:
    """Stands for the result of a call that was killed; ``None`` is what a function may return."""


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
    except Exception as error:  # whatever the module's own code raises
        raise ConfigurationError(
            f"cannot import the function {path!r}: its module raised {type(error).__name__}: {one_line(error)}"
        ) from error
    if not callable(function):
        raise ConfigurationError(f"{path!r} is not callable")
    return function


class UserFunction:
    """A user's function as grading processes call it: awaited if it is asynchronous, its exceptions scored if wanted.

    It travels to them by pickle. An object that cannot be pickled, such as a lambda, is inherited instead: the
    processes are forked, and find it by its number.

    Args:
        function: Import path, or the function.
        on_error: What an exception does: ``stop`` the run, or score ``zero``.

    Attributes:
        arguments: What it is given.
        name: Its own name.
        is_async: Whether it is a coroutine function.

    Raises:
        ConfigurationError: There is no such function, or it takes no response.
    """

    def __init__(self, function: str | Callable[..., Any], on_error: OnError = "stop") -> None:
        if on_error not in ("stop", "zero"):
            raise ConfigurationError(f"on_error must be stop or zero, got {on_error!r}")
        self._source = function
        self._on_error = on_error
        self.__wrapped__ = import_function(function) if isinstance(function, str) else function
        if not callable(self.__wrapped__):
            raise ConfigurationError(f"{function!r} is not callable: give a function or its import path")
        self.arguments = Arguments(self.__wrapped__)
        self.name = name_of(self.__wrapped__)
        self.__qualname__ = getattr(self.__wrapped__, "__qualname__", self.name)
        called = getattr(self.__wrapped__, "__call__", None)  # noqa: B004 (of an object)
        self.is_async = inspect.iscoroutinefunction(self.__wrapped__) or inspect.iscoroutinefunction(called)
        self._number: int | None = None
        if not isinstance(function, str) and not _can_be_pickled(function):
            self._number = next(_NUMBERS)
            _INHERITED[self._number] = self

    def __call__(self, /, *texts: str, **named: Any) -> Any:
        """The function's result; awaited if it has to be."""
        try:
            result = self.__wrapped__(*texts, **named)
            return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except (Exception, SystemExit) as error:
            failed = self.failed(error)
            return [failed] * len(named["completions"]) if self.arguments.is_batch else failed

    def failed(self, error: BaseException) -> FailedScore:
        """The score of an exception that is being handled; raises it where it stops the run.

        So does one for lack of memory, which is a limit of the pool.
        """
        if self._on_error == "stop" or is_of_memory(error):
            raise error
        return FailedScore.of(f"{self.__qualname__} raised {told(error)}")

    def __reduce__(self) -> tuple[Any, ...]:
        if self._number is not None:
            return _inherited, (self._number, self.__qualname__)
        return type(self), (self._source, self._on_error)


class AtOnce:
    """Calls of an asynchronous function for several responses, which wait side by side.

    Args:
        function: The function.
    """

    def __init__(self, function: UserFunction) -> None:
        self._function = function
        self.__qualname__ = function.__qualname__

    def __call__(self, *calls: tuple[Sequence[str], Mapping[str, Any]]) -> list[Any]:
        """The results of calls with these positional and named arguments."""
        return asyncio.run(self._all(calls))

    async def _all(self, calls: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[Any]:
        return list(await asyncio.gather(*(self._one(texts, named) for texts, named in calls)))

    async def _one(self, texts: Sequence[str], named: Mapping[str, Any]) -> Any:
        try:
            return await self._function.__wrapped__(*texts, **named)
        except (Exception, SystemExit) as error:
            return self._function.failed(error)


class FunctionReward(Reward):
    """A user's function, run in a worker process. Its signature says what it is given (``docs/rewards.md``).

    Args:
        function: The function, or its import path, e.g. ``my_package.rewards.brevity``.
        weight: Factor of the term in the sum.
        name: Name of the term in metrics; the function's own if not given.
        on_error: What an exception of the function does: ``stop`` the run, or score ``zero`` and be counted.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        weight: float = 1.0,
        name: str | None = None,
        on_error: OnError = "stop",
    ) -> None:
        super().__init__(weight)
        self.function = function
        self._call = UserFunction(function, on_error)
        self._name = name or self._call.name
        self._judges_groups = self._call.arguments.is_batch or self._call.is_async
        self.response_function = None if self._judges_groups else self._call
        self.isolated = True

    @property
    def name(self) -> str:
        """The name that was given, or the function's own."""
        return self._name

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Which columns the function asks for in vain."""
        return self._call.arguments.problem(row, f"reward {self.name!r}")

    def score(self, group: Sequence[Sample]) -> list[float | None]:
        """The function's values, computed in this process."""
        if self._judges_groups:
            function, positional, named = self._of_group(group)
            return cast(list[float | None], function(*positional, **named))
        calls = [self._call.arguments.of_sample(sample) for sample in group]
        return [self._call(*texts, **named) for texts, named in calls]

    def score_groups(self, groups: Sequence[Sequence[Sample]], pool: GradingPool) -> list[list[float | None]]:
        """The function's values, those of each group from one call in a worker process."""
        if not self._judges_groups:
            return [self.score(group) for group in groups]
        calls = []
        for group in groups:
            function, positional, named = self._of_group(group)
            limits = 1 if self._call.is_async else len(group)  # responses wait side by side, or one after the other
            calls.append((group[0], pool.submit(function, *positional, named=named, limits=limits)))
        results = collect_results(pool, calls, killed=_Killed)
        return [
            [0.0] * len(group) if result is _Killed else result for group, result in zip(groups, results, strict=True)
        ]

    def _of_group(self, group: Sequence[Sample]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """What judges a group in one call, with its positional and its named arguments."""
        arguments = self._call.arguments
        if arguments.is_batch:
            return self._call, [], arguments.of_group(group)
        return AtOnce(self._call), [arguments.of_sample(sample) for sample in group], {}


# Functions that cannot be pickled, for processes that are forked from this one.
_INHERITED: weakref.WeakValueDictionary[int, UserFunction] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def _inherited(number: int, name: str) -> UserFunction:
    function = _INHERITED.get(number)
    if function is None:
        raise RewardError(
            f"{name} cannot be pickled, and was made after the grading processes were started: define it with def in a "
            "module"
        )
    return function


def _can_be_pickled(function: Callable[..., Any]) -> bool:
    try:
        pickle.dumps(function)
    except Exception:  # whatever an object's own method raises
        return False
    return True


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
