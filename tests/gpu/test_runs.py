"""Runs on a GPU, with vLLM and with DeepSpeed. The last part of ``make test-gpu``; minutes, the cheapest first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache.cuts import AnchoredCut
from rpo_lightning.cache.refresh import CorrectMemberRefresh
from rpo_lightning.cli.main import main
from rpo_lightning.policy.load import load_policy
from rpo_lightning.rollout import VLLMEngine
from tests.conftest import REASONER, make_data, make_module, make_trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_quickstart_makes_an_iteration_in_mixed_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([
        "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.accelerator", "gpu",
        "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1", "--data.val.init_args.size", "128",
    ])  # fmt: skip
    summary = json.loads((tmp_path / "runs" / "quickstart" / "version_0" / "summary.json").read_text())
    assert summary["updates"] == 1
    assert 0.2 < summary["accuracy_before"] < 0.55  # on a CPU 0.37 of 512, 0.41 of these


# The default level first.
@pytest.mark.parametrize(
    ("sleep_level", "policy"), [(n, kind) for n in "210" for kind in ("tied", "untied", "adapted")]
)
def test_vllm_follows_the_policy_with_cuda_graphs_and_through_sleep(policy, sleep_level):
    command = [
        sys.executable,
        "-m",
        "tests.rollout.vllm_sleep",
        policy,
        sleep_level,
    ]  # a process has one engine that sleeps
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def fit(folder, steps, checkpoint=None, engine=None, **trainer_settings):
    module = make_module(engine=engine)
    cache = ExperienceCacheCallback(AnchoredCut(), CorrectMemberRefresh(), initialisation="lazy")
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(
        folder, accelerator="gpu", precision="bf16-mixed", max_steps=steps, callbacks=[cache, saving],
        **trainer_settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=make_data(), ckpt_path=checkpoint)
    return trainer, module, cache


def test_rpo_trains_on_vllm_in_mixed_precision_and_resumes(tmp_path):
    def engine():
        return VLLMEngine(gpu_memory_utilization=0.2, options={"max_num_seqs": 64})

    trainer, module, cache = fit(tmp_path / "whole", 6, engine=engine())
    assert 0 < trainer.callback_metrics["mismatch/logprob_mean"] < 0.05
    assert any(entry.response is not None for entry in cache.cache)
    checkpoint = next((tmp_path / "whole").glob("*step=4.ckpt"))
    resumed, again, _ = fit(tmp_path / "resumed", 6, checkpoint, engine())
    assert (resumed.global_step, again.iteration) == (6, module.iteration)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains(tmp_path, stage):
    pytest.importorskip("deepspeed")
    start = load_policy(REASONER).state_dict()
    trainer, module, cache = fit(tmp_path, 2, strategy=f"deepspeed_stage_{stage}")
    assert 0 < trainer.callback_metrics["loss/grad_norm"] < 100
    assert any(entry.response is not None for entry in cache.cache)
    module.save_pretrained(tmp_path / "policy")
    end = load_policy(str(tmp_path / "policy")).state_dict()
    change = max((end[name].float().cpu() - before.float()).abs().max() for name, before in start.items())
    assert 1e-5 < change < 1e-2  # two steps of AdamW at 1e-4, and bf16's rounding of weights below 1
