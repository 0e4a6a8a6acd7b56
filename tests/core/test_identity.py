"""What grades responses is told apart from what graded them before, in every process alike."""

from __future__ import annotations

import functools
import importlib
import logging
import sys

import pytest

from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.core.identity import description
from rpo_lightning.rewards import (
    AccuracyReward,
    ExactMatchVerifier,
    FunctionReward,
    LengthAwareAccuracyReward,
)
from tests.conftest import make_data, make_module, make_trainer

MODULE = """
from rpo_lightning.rewards import Reward, Verifier

class Base(Verifier):
    isolated = False
    def verify(self, prompt, response, answer):
        return float(answer in response)

class Mine(Base):
    pass

def short(response):
    return 1.0 / (1 + len(response))
"""
CHANGED = MODULE.replace("in response", "in response[:9]")


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports a text as a module of a name, anew if it was imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield load
    for name in ("mine", "theirs"):
        sys.modules.pop(name, None)


def test_a_verifier_or_function_of_the_same_name_is_another_one_if_module_or_source_are(imported):
    mine, theirs = imported("mine", MODULE), imported("theirs", MODULE)
    changed = {
        "the function": MODULE.replace("1.0 /", "2.0 /"),
        "the class": MODULE.replace("pass", "marker = 1"),
        "a class that it is derived from": MODULE.replace("answer in", "answer == "),
    }
    seen = {description(mine.Mine()), description(theirs.Mine()), description(mine.short), description(theirs.short)}
    assert len(seen) == 4
    before = (description(mine.Mine()), description(FunctionReward("mine.short")))
    for what, text in changed.items():
        again = imported("mine", text)
        after = (description(again.Mine()), description(FunctionReward("mine.short")))
        assert [a != b for a, b in zip(before, after, strict=True)] == [what != "the function", what == "the function"]
    again = imported("mine", MODULE)
    assert (description(again.Mine()), description(FunctionReward("mine.short"))) == before


def test_settings_count_and_what_is_counted_at_run_time_does_not():
    def described(**settings):
        return description(LengthAwareAccuracyReward(**settings))

    assert described() == described() != described(alpha=0.02)
    assert description(ExactMatchVerifier("#")) != description(ExactMatchVerifier("="))
    assert description(FunctionReward(_short)) == description(FunctionReward(_short)) != description(_long)
    assert description(functools.partial(_short, x=1)) != description(functools.partial(_short, x=2))
    first = FunctionReward(lambda response: 1.0)
    second = FunctionReward(lambda response: 2.0)
    assert description(first) != description(second)


def test_a_description_has_nothing_of_a_process_such_as_addresses():
    things = (FunctionReward(_short), AccuracyReward(), Local(), Local().verify, functools.partial(_short, x=Local()))
    assert all(" at 0x" not in repr(description(thing)) for thing in things)


def _short(response, x=0):
    return 1.0 / (1 + len(response))


def _long(response):
    return float(len(response))


class Local(ExactMatchVerifier):
    """A class of the user's."""


def test_a_filling_that_another_source_has_graded_is_begun_anew(imported, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    begun = _stopped_in_its_filling(imported("mine", MODULE).Mine(), tmp_path / "first")
    for text, told in ((MODULE, "the cache is filled on from question 4 of 16"), (CHANGED, "fills its cache anew")):
        cache = ExperienceCacheCallback(initialisation="eager", initial_batch_size=4, path=str(begun))
        trainer = make_trainer(tmp_path / told, max_steps=1, callbacks=[cache])
        caplog.clear()
        module = make_module(verifier=imported("mine", text).Mine(), max_response_tokens=20)
        trainer.fit(module, datamodule=make_data())
        assert told in caplog.text


def _stopped_in_its_filling(verifier, folder):
    """The cache file of a run that fails in the second batch of its filling."""
    module = make_module(verifier=verifier, max_response_tokens=20)
    cache = ExperienceCacheCallback(initialisation="eager", initial_batch_size=4)
    answer, batches = module.roll_out, []

    def fails(*args):
        batches.append(args)
        if len(batches) == 2:
            raise RuntimeError("stopped")
        return answer(*args)

    module.roll_out = fails
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(folder, max_steps=1, callbacks=[cache]).fit(module, datamodule=make_data())
    return next(folder.rglob("cache.parquet"))
