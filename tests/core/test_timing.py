"""Phases of an iteration are exclusive and add up to its time."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.callbacks import ExperienceCacheCallback, RunSummaryCallback
from rpo_lightning.core import timing
from rpo_lightning.core.timing import PhaseTimer
from rpo_lightning.rewards import Grading
from rpo_lightning.rollout.transformers.engine import TransformersEngine, _DecodingBatch
from rpo_lightning.update import loss as update
from rpo_lightning.update.objectives import GRPO
from tests.conftest import make_data, make_module, make_trainer


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def test_a_phase_within_a_phase_counts_once_and_the_rest_is_what_is_left(clock):
    timer = PhaseTimer()
    clock(1)
    with timer("update"):
        clock(2)
        with timer("reference_logprobs"):
            clock(4)
        clock(8)
    with timer("decode"):
        clock(16)
    timer.move("decode", "prefill", 0.25)
    assert timer.take() == {"update": 10, "reference_logprobs": 4, "decode": 12, "prefill": 4, "rest": 1}
    clock(3)
    assert timer.take() == {"rest": 3}


# Seconds of each call by the test's clock. All differ, and so do their sums.
SECONDS = {
    "prefill": 1, "decode": 3, "reward": 8, "old_logprobs": 16, "reference_logprobs": 128, "update": 1024,
    "sync": 8192, "cache": 16384, "rest": 131072,
}  # fmt: skip


@pytest.fixture
def work(monkeypatch, clock):
    """Makes the calls of each phase take its seconds of the clock, and all else none; counts the calls."""
    calls = dict.fromkeys(SECONDS, 0)

    def take(phase):
        calls[phase] += 1
        clock(SECONDS[phase])

    def slow_down(owner, name, phase_of):
        whole = getattr(owner, name)

        def slow(*args, **kwargs):
            take(phase_of(*args))
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    def kind_of_pass(model, *_):
        if torch.is_grad_enabled():
            return "update"
        return "old_logprobs" if any(p.requires_grad for p in model.parameters()) else "reference_logprobs"

    slow_down(_DecodingBatch, "_prefill", lambda *_: "prefill")
    slow_down(_DecodingBatch, "_decode", lambda *_: "decode")
    slow_down(Grading, "finish", lambda *_: "reward")
    slow_down(update, "token_logprobs", kind_of_pass)
    slow_down(TransformersEngine, "_copy_weights", lambda *_: "sync")
    slow_down(CachedPrefixes, "update_from", lambda *_: "cache")

    class Rest(Callback):
        """Work that belongs to no phase."""

        def on_train_batch_start(self, *_):
            take("rest")

    return calls, Rest()


def test_the_summary_tells_seconds_and_tokens_of_every_phase(tmp_path, capsys, work):
    calls, rest = work
    summary, cache = RunSummaryCallback(), ExperienceCacheCallback(initialisation="eager")
    # A reference and two updates an iteration make every phase occur.
    module = make_module(objective=GRPO(beta=0.01), minibatches_per_pass=2)
    trainer = make_trainer(tmp_path, callbacks=[cache, summary, rest], max_steps=4)
    trainer.fit(module, datamodule=make_data())
    assert module.iteration == 2
    phases = summary.summary(trainer)["phases"]
    # One batch of the initialisation, then two iterations of four groups.
    assert [calls[p] for p in ("prefill", "decode", "reward", "cache", "rest")] == [3, 3, 3, 8, 2]
    # A sync at the start and one between the iterations; one pass of policy and reference for each of four updates.
    assert calls["sync"] == 2
    assert calls["update"] == calls["reference_logprobs"] == 4
    assert calls["old_logprobs"] == 2
    assert {name: phase["seconds"] for name, phase in phases.items()} == {
        "initialise": 1 + 3 + 8,
        "prefill": 2 * 1,
        "decode": 2 * 3,
        "reward": 2 * 8,
        "old_logprobs": 2 * 16,
        "reference_logprobs": 4 * 128,
        "update": 4 * 1024,
        "sync": 8192,
        "cache": 8 * 16384,
        "rest": 2 * 131072,
    }
    assert list(phases) == ["initialise", *SECONDS]
    # The sync at the start of the run belongs to no iteration.
    assert sum(phase["seconds"] for phase in phases.values()) == summary.seconds - 8192
    assert phases["initialise"]["tokens"] == cache.initialisation_tokens
    assert phases["decode"]["tokens"] == summary.decoded_tokens
    # Each group's context once, and every suffix.
    assert phases["update"]["tokens"] == phases["prefill"]["tokens"] + phases["decode"]["tokens"]
    screen = capsys.readouterr().out.splitlines()
    table = screen[next(i for i, line in enumerate(screen) if line.startswith("phase ")) + 1 :]
    printed = {line.split()[0]: float(line.split()[1]) for line in table}
    assert printed == {name: phase["seconds"] for name, phase in phases.items()}


def test_a_validation_adds_nothing_to_the_phases_and_takes_nothing_from_them(tmp_path, work):
    calls, rest = work
    summary, cache = RunSummaryCallback(), ExperienceCacheCallback(initialisation="lazy")
    trainer = make_trainer(
        tmp_path, callbacks=[cache, summary, rest], max_steps=2, val_check_interval=1, limit_val_batches=1.0
    )
    trainer.fit(make_module(), datamodule=make_data())
    phases = {name: phase["seconds"] for name, phase in summary.summary(trainer)["phases"].items()}
    assert calls["prefill"] == 2 + 2  # two iterations, two validations
    assert (phases["prefill"], phases["decode"], phases["reward"]) == (2 * 1, 2 * 3, 2 * 8)
    # Refreshes and syncs come between an iteration and its validation. The first sync belongs to no iteration.
    assert phases["cache"] == calls["cache"] * 16384 == 8 * 16384
    assert phases["sync"] == (calls["sync"] - 1) * 8192 == 2 * 8192
    assert phases["rest"] == 2 * 131072


def test_every_pass_over_the_rows_of_an_update_is_counted_under_its_phase(tmp_path):
    """Two minibatches need old log-probs of all rows, a KL penalty those of the reference policy."""
    summary = RunSummaryCallback()
    module = make_module(objective=GRPO(beta=0.01), minibatches_per_pass=2)
    trainer = make_trainer(tmp_path, callbacks=[summary], max_steps=2)
    trainer.fit(module, datamodule=make_data())
    tokens = {phase: of_phase["tokens"] for phase, of_phase in summary.summary(trainer)["phases"].items()}
    assert tokens["update"] == tokens["prefill"] + tokens["decode"]
    assert tokens["old_logprobs"] == tokens["reference_logprobs"] == tokens["update"]
