"""Where an iteration's time goes: phases are exclusive and add up."""

from __future__ import annotations

import pytest

from rpo_lightning import timing
from rpo_lightning.callbacks import ExperienceCacheCallback, RunSummaryCallback
from rpo_lightning.objectives import GRPO
from rpo_lightning.timing import PHASES, PhaseTimer

from .conftest import make_data, make_module, make_trainer


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


def test_the_summary_tells_seconds_and_tokens_of_every_phase(tmp_path, capsys):
    summary, cache = RunSummaryCallback(), ExperienceCacheCallback(initialisation="eager")
    module = make_module(objective=GRPO(beta=0.01))
    trainer = make_trainer(tmp_path, callbacks=[cache, summary], max_steps=2)
    trainer.fit(module, datamodule=make_data())
    phases = summary.summary(trainer)["phases"]
    assert list(phases) == [phase for phase in PHASES if phase != "old_logprobs"]
    assert all(phase["seconds"] >= 0 for phase in phases.values())
    assert sum(phase["seconds"] for phase in phases.values()) <= summary.seconds
    assert phases["initialise"]["tokens"] == cache.initialisation_tokens
    assert phases["decode"]["tokens"] == summary.decoded_tokens
    # Prompt and prefix once a group, and every suffix.
    assert phases["update"]["tokens"] == phases["prefill"]["tokens"] + phases["decode"]["tokens"]
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in phases)


def test_every_pass_over_the_rows_of_an_update_is_counted_under_its_phase(tmp_path):
    """Two minibatches need the old policy's log-probs, a KL penalty those of the reference, both of all rows."""
    summary = RunSummaryCallback()
    module = make_module(objective=GRPO(beta=0.01), minibatches_per_pass=2)
    trainer = make_trainer(tmp_path, callbacks=[summary], max_steps=2)
    trainer.fit(module, datamodule=make_data())
    tokens = {phase: of_phase["tokens"] for phase, of_phase in summary.summary(trainer)["phases"].items()}
    assert tokens["update"] == tokens["prefill"] + tokens["decode"]
    assert tokens["old_logprobs"] == tokens["reference_logprobs"] == tokens["update"]
