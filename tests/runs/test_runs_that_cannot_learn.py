"""Runs that cannot learn say so, and end."""

from __future__ import annotations

import logging

import pytest

from rpo_lightning.core.errors import ConfigurationError, UpdateError
from rpo_lightning.rewards import AccuracyReward, ExactMatchVerifier, Reward
from rpo_lightning.update.advantages import ReinforcePlusPlus
from rpo_lightning.update.dynamic_sampling import DynamicSampling, GroupBuffer
from rpo_lightning.update.settings import UpdateSettings
from tests.conftest import make_data, make_group, make_module, make_trainer

NEVER_RIGHT = ExactMatchVerifier(marker="@@")


class FormatOnly(Reward):
    """Varies within every group, whatever is right."""

    def score(self, group):
        return [float(i) for i in range(len(group))]


class OneForAll(Reward):
    """The same for all members of a group, and another for another question."""

    def score(self, group):
        return [float(sum(map(ord, group[0].prompt)))] * len(group)


def blind_module(**settings):
    """A module whose verifier finds nothing in any response."""
    return make_module(
        **{"verifier": NEVER_RIGHT, "group_size": 2, "max_response_tokens": 8, **settings}, rewards=[AccuracyReward()]
    )


def test_dynamic_sampling_without_a_usable_group_warns_once_and_stops_with_a_diagnosis(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    module = blind_module(dynamic_sampling=DynamicSampling(1))
    with pytest.raises(UpdateError, match=r"16 iterations in a row.* 0% of its responses are right, 100% are cut off"):
        make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data(batch_size=2))
    assert module.iteration == 16
    warnings = [r.getMessage() for r in caplog.records if "made no update" in r.getMessage()]
    assert len(warnings) == 1
    assert "raise model.max_response_tokens" in warnings[0]
    assert "check that the verifier reads" in warnings[0]


def test_the_number_of_idle_iterations_is_a_setting_and_0_never_stops(tmp_path):
    module = blind_module(dynamic_sampling=DynamicSampling(1), max_idle_iterations=3)
    with pytest.raises(UpdateError, match="3 iterations in a row"):
        make_trainer(tmp_path).fit(module, datamodule=make_data(batch_size=2))
    module = blind_module(dynamic_sampling=DynamicSampling(1), max_idle_iterations=0)
    make_trainer(tmp_path, max_steps=-1, max_epochs=3).fit(module, datamodule=make_data(batch_size=2))
    assert module.iteration == 24
    assert module.watch.idle == 24
    with pytest.raises(ConfigurationError, match=r"model\.update\.max_idle_iterations must be at least 0"):
        UpdateSettings(max_idle_iterations=-1)


def test_idle_iterations_are_counted_across_a_resume(tmp_path):
    module = blind_module(dynamic_sampling=DynamicSampling(1), max_idle_iterations=3)
    trainer = make_trainer(tmp_path / "first", max_steps=-1, max_epochs=1)
    trainer.fit(module, datamodule=make_data(batch_size=8))
    trainer.save_checkpoint(tmp_path / "idle.ckpt")
    module = blind_module(dynamic_sampling=DynamicSampling(1), max_idle_iterations=3)
    trainer = make_trainer(tmp_path / "second", max_steps=-1, max_epochs=3)
    with pytest.raises(UpdateError, match="3 iterations in a row"):
        trainer.fit(
            module, datamodule=make_data(batch_size=8), ckpt_path=str(tmp_path / "idle.ckpt"), weights_only=True
        )
    assert module.iteration == 3


def test_a_refill_that_finds_groups_is_not_idle(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    module = make_module(
        rewards=[FormatOnly()], max_response_tokens=8, max_idle_iterations=1, group_size=2,
        dynamic_sampling=DynamicSampling(max_refills=50, filter="reward"),
    )  # fmt: skip
    carries = module.buffer._carries_signal
    module.buffer._carries_signal = lambda g: carries(g) and g is module.groups[0]  # one group of each batch
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data())
    assert module.iteration == 8
    assert "made no update" not in caplog.text


def test_equal_rewards_iteration_after_iteration_are_told_without_dynamic_sampling(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    make_trainer(tmp_path, max_steps=6).fit(blind_module(), datamodule=make_data(batch_size=2))
    told = [r.getMessage() for r in caplog.records if "equal rewards within every group" in r.getMessage()]
    assert len(told) == 1
    assert "nothing is learned" in told[0]


def test_equal_rewards_are_not_told_where_they_teach(tmp_path, caplog):
    """Against the mean of the batch, a group that is all right is better than one that is all wrong."""
    caplog.set_level(logging.WARNING)
    module = make_module(
        rewards=[OneForAll()], group_size=2, max_response_tokens=8, advantages=ReinforcePlusPlus()
    )  # fmt: skip
    make_trainer(tmp_path, max_steps=3).fit(module, datamodule=make_data(batch_size=4))
    assert module.record.metrics["rollout/zero_variance_share"] == 1.0
    assert "equal rewards within every group" not in caplog.text


def test_rewards_that_differ_are_not_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    module = make_module(rewards=[FormatOnly()], max_response_tokens=8)
    make_trainer(tmp_path, max_steps=4).fit(module, datamodule=make_data())
    assert "nothing is learned" not in caplog.text
    assert "made no update" not in caplog.text


@pytest.mark.parametrize(
    ("correct", "rewards", "by_verdict", "by_reward"),
    [
        ([True, True], [1.0, 1.5], False, True),  # all right, but a length reward varies
        ([False, False], [0.0, 0.2], False, True),  # all wrong, but a format reward varies
        ([True, False], [1.0, 0.0], True, True),
        ([True, False], [1.0, 1.0], False, False),  # equal rewards have no advantage
    ],
)
def test_dapo_filters_by_the_verdict_and_optionally_by_the_reward(correct, rewards, by_verdict, by_reward):
    group = make_group(rewards, correct=correct)
    assert bool(GroupBuffer(DynamicSampling()).add([group])) == by_verdict
    assert bool(GroupBuffer(DynamicSampling(filter="reward")).add([group])) == by_reward


def test_an_unknown_filter_is_refused():
    with pytest.raises(ConfigurationError, match=r"model\.dynamic_sampling\.filter must be verdict or reward"):
        DynamicSampling(filter="rewards")


def test_a_reward_that_varies_saves_no_group_that_is_all_wrong(tmp_path):
    module = make_module(
        rewards=[FormatOnly()], verifier=NEVER_RIGHT, max_response_tokens=8, max_idle_iterations=2,
        dynamic_sampling=DynamicSampling(),
    )  # fmt: skip
    with pytest.raises(UpdateError, match="check that the verifier reads"):
        make_trainer(tmp_path).fit(module, datamodule=make_data())
