"""DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks on the CPU, with a strategy that skips Lightning's check for GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.parallel.deepspeed import prepare_settings

if importlib.util.find_spec("deepspeed") is None:  # importing it would choose an accelerator for other tests
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
SCENARIOS = ("update", "adapter", "not_finite", "validate", "fit")


def run(folder: Path, stage: int, launcher: list[str], scenarios: tuple[str, ...]) -> Path:
    """Run scenarios in processes of their own."""
    script, root = Path(__file__).parent / "deepspeed_rank.py", str(Path(__file__).parents[3])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, *launcher, str(script), str(folder), str(stage), *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv")


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory) -> Path:
    """Results of two ranks under a stage of ZeRO, a folder for each scenario."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run(tmp_path_factory.mktemp(f"zero{request.param}"), request.param, launcher, SCENARIOS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Results of one process on the same groups, without DeepSpeed."""
    return run(tmp_path_factory.mktemp("alone"), 0, [], ("update", "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["update", "adapter"])
def test_updates_give_the_parameters_that_one_process_gives(results, alone, scenario):
    expected, found = weights(alone / scenario), weights(results / scenario)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["update", "adapter"])
def test_the_norm_is_that_of_the_whole_gradient_and_the_schedule_steps_once_an_update(results, alone, scenario):
    expected, found = metrics(alone / scenario), metrics(results / scenario)
    assert found["loss/grad_norm"].tolist() == pytest.approx(expected["loss/grad_norm"].tolist(), rel=1e-3)
    assert (expected["loss/grad_norm"] > 0.05).all()  # every update was clipped
    assert found["loss/learning_rate"].tolist() == pytest.approx([0, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert found["loss/kl"].tolist() == pytest.approx(expected["loss/kl"].tolist(), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_updates_that_are_not_finite_change_nothing_on_any_rank_and_stop_the_run_after_three(results):
    for rank in (0, 1):
        found = json.loads((results / "not_finite" / f"{rank}.json").read_text())
        assert found["error"].startswith("3 updates in a row were skipped")
        assert (found["same"], found["skipped"], found["updates"]) == (True, 4, 2)


@pytest.mark.slow
def test_a_resumed_run_continues_as_the_uninterrupted_one(results):
    whole, resumed = results / "fit" / "whole", results / "fit" / "resumed"
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    for rank in (0, 1):
        state = json.loads((whole / f"{rank}.json").read_text())
        assert state == json.loads((resumed / f"{rank}.json").read_text())
        assert any(response for _, response in state["entries"])
    assert (whole / "step=2.ckpt" / "checkpoint").is_dir()


@pytest.mark.slow
def test_a_policy_is_evaluated_without_being_trained(results):
    first, second = (json.loads((results / "validate" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["val/response_tokens"] == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "use ddp"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}, "leave gradient_clipping out"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "use bf16-mixed"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, r"model\.optimizer"),
        ({"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True}}, r"trainer\.precision"),
    ],
)
def test_settings_that_an_update_cannot_work_with_are_refused(config, message):
    with pytest.raises(ConfigurationError, match=message):
        prepare_settings(config, max_norm=1.0)


def test_deepspeed_clips_at_the_limit_of_the_module():
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    prepare_settings(config, max_norm=0.3)
    assert config["gradient_clipping"] == 0.3
