"""Whatever a worker raises is the worker's failure: it never ends the trainer without a word."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import RewardError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards import ExactMatchVerifier, FunctionReward, FunctionVerifier, Grader, GradingPool, Reward
from tests.conftest import make_data, make_module, make_trainer

SAMPLES = [[Sample("q", "a#1", "1", 3, True)] * 2]


def run_code(prompt, response, answer):
    exec("raise SystemExit(3)")  # what model-written code with exit() does
    return 1.0


def interrupts(prompt, response, answer):
    raise KeyboardInterrupt


def stops_iterating(prompt, response, answer):
    raise GeneratorExit


def ends_its_process(prompt, response, answer):
    os._exit(3)


def kills_its_process(prompt, response, answer):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (run_code, "raised SystemExit: 3"),
        (interrupts, "raised KeyboardInterrupt"),
        (stops_iterating, "raised GeneratorExit"),
    ],
)
def test_what_a_worker_raises_is_an_error_with_the_functions_name(function, told):
    path = f"{__name__}.{function.__name__}"
    for verifier, name in (
        (ExactMatchVerifier(), function.__name__),
        (FunctionVerifier(path), "FunctionVerifier.verify"),
    ):
        grader = Grader(verifier, [FunctionReward(path)], GradingPool(workers=1))
        with pytest.raises(RewardError, match=f"{name} {told}"):
            grader.grade(SAMPLES)
        grader.pool.close()


@pytest.mark.parametrize("function", [ends_its_process, kills_its_process])
def test_a_worker_that_dies_is_counted_and_scores_zero(function):
    pool = GradingPool(workers=1)
    grader = Grader(ExactMatchVerifier(), [FunctionReward(f"{__name__}.{function.__name__}")], pool)
    (graded,) = grader.grade(SAMPLES)
    pool.close()
    assert graded.rewards == [0.0, 0.0]
    assert pool.killed == 2


class Exits(Reward):
    """Calls ``exit()`` in the trainer's own process."""

    def score(self, group):
        sys.exit("no more")


def test_a_reward_that_exits_in_the_trainers_process_is_an_error_too(tmp_path):
    with pytest.raises(RewardError, match="reward 'exits' raised SystemExit: no more"):
        make_trainer(tmp_path).fit(make_module(rewards=[Exits()]), datamodule=make_data())


def test_the_command_line_tells_a_reward_that_exits_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("exiting.py").write_text("def reward(prompt, response, answer):\n    exit(0)\n")
    quickstart = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    rewards = '[{"class_path": "FunctionReward", "init_args": {"function": "exiting.reward"}}]'
    with pytest.raises(SystemExit) as ended:
        main(
            ["fit", "--config", quickstart, "--model.rewards", rewards, "--model.max_response_tokens", "8",
             "--trainer.num_sanity_val_steps", "0", "--trainer.accelerator", "cpu"]
        )  # fmt: skip
    assert ended.value.code == 2
    assert "rpo-lightning: error: reward raised SystemExit: 0" in capsys.readouterr().err
