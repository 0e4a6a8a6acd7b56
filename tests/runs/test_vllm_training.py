"""Training with rollouts on the real vLLM: syncs, the guard, resume, and ends of every kind."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from rpo_lightning.cache.cuts import UniformCut
from rpo_lightning.callbacks import ExperienceCacheCallback, WeightSyncCallback
from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import ConfigurationError, EngineError, RewardError
from rpo_lightning.policy.load import resolve_policy
from rpo_lightning.rewards import FunctionReward, UniformRandomReward
from rpo_lightning.rollout import Sampling, VLLMEngine
from tests.conftest import make_data, make_module, make_trainer
from tests.rollout import test_grading_while_decoding as grading

pytestmark = pytest.mark.long

OPTIONS = {"max_num_seqs": 32, "block_size": 32}


def vllm_module(**settings):
    defaults = {"engine": VLLMEngine(options=OPTIONS), "rewards": [UniformRandomReward()]}
    return make_module(**{**defaults, **settings})


def cached() -> ExperienceCacheCallback:
    return ExperienceCacheCallback(cut=UniformCut(40), initialisation="lazy")


def metrics(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv")


def test_a_run_syncs_once_per_update_and_the_policies_agree(tmp_path):
    sync = WeightSyncCallback()
    module = vllm_module()
    trainer = make_trainer(tmp_path, callbacks=[cached(), sync], max_steps=5, limit_val_batches=1, val_check_interval=1)
    trainer.fit(module, datamodule=make_data())
    # One before each of the five rollouts, one for the validation after the last update: the others need none.
    assert sync.syncs == 6
    log = metrics(tmp_path)
    assert (log["mismatch/logprob_max"].dropna() < 1e-4).all()
    assert log["mismatch/ratio_mean"].dropna().tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert (log["rollout/prefix_cache_hit_share"].dropna() > 0.3).all()
    # Every sync gives vLLM all weights, the embedding once more as the output head.
    given = [*module.loaded_policy.parameters(), module.loaded_policy.get_output_embeddings().weight]
    weights = sum(p.numel() * p.element_size() for p in given)
    assert set(log["rollout/synced_bytes"].dropna()) == {weights}
    assert log["rollout/decoded_tokens_per_sample"].dropna().iloc[-1] < 150  # suffixes


def test_a_skipped_sync_is_caught_within_one_iteration(tmp_path):
    class ForgetfulEngine(VLLMEngine):
        copies = 0

        def _copy_weights(self, policy):
            self.copies += 1
            if self.copies != 4:
                super()._copy_weights(policy)

    module = vllm_module(engine=ForgetfulEngine(options=OPTIONS))
    trainer = make_trainer(tmp_path, max_steps=8)
    with pytest.raises(EngineError, match=r"update 3: .* weights are stale"):
        trainer.fit(module, datamodule=make_data())
    assert trainer.global_step == 3  # the policy was left as it was


def test_a_resumed_run_continues_as_the_uninterrupted_one(tmp_path):
    def run(folder, steps, **fit):
        module = vllm_module()
        checkpoint = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
        make_trainer(folder, callbacks=[cached(), checkpoint], max_steps=steps).fit(
            module, datamodule=make_data(), **fit
        )
        return module, metrics(folder)

    whole, expected = run(tmp_path / "whole", 6)
    run(tmp_path / "first", 4)
    (last,) = (tmp_path / "first").glob("*step=4.ckpt")
    resumed, log = run(tmp_path / "second", 6, ckpt_path=last)
    for column in ("reward/mean", "rollout/response_tokens", "cache/length", "loss/entropy"):
        assert log[column].tolist() == expected[column].tolist()[-2:], column
    for (name, first), second in zip(
        whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


ADAPTER_RUN = [
    "fit", "--config", str(Path(__file__).parents[2] / "configs" / "quickstart_vllm.yaml"), "--model.adapter", "LoRA",
    "--model.adapter.rank", "4", "--model.engine.sync", "adapter", "--model.optimizer.lr", "0.01",
    "--model.rewards", '[{"class_path": "UniformRandomReward"}]', "--model.group_size", "4", "--data.batch_size", "4",
    "--model.max_response_tokens", "64", "--data.train.size", "12", "--data.val.size", "8", "--trainer.max_steps", "3",
    "--trainer.callbacks", '[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", '
    '"init_args": {"every_n_train_steps": 2, "save_top_k": -1}}]', "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def test_a_run_that_gives_vllm_the_adapter_alone_is_in_sync_and_resumes_exactly(tmp_path, monkeypatch):
    def run(folder, *options):
        folder.mkdir()
        monkeypatch.chdir(folder)
        main([*ADAPTER_RUN, *options])
        (written,) = folder.glob("runs/quickstart_vllm/version_0")
        log = metrics(written)
        # After an update of this size, an engine with stale weights would be 100 times as far away.
        assert (log["mismatch/logprob_max"].dropna() < 1e-4).all()
        weights = load_file(written / "policy" / "model.safetensors")
        return written, log[log["loss/total"].notna()], weights

    written, whole, expected = run(tmp_path / "whole")
    saved = next(written.glob("checkpoints/*step=2.ckpt"))
    assert all("lora_" in name for name in torch.load(saved, weights_only=True)["state_dict"])
    _, resumed, found = run(tmp_path / "resumed", "--ckpt_path", str(saved))
    assert len(whole) == 3
    assert resumed["loss/entropy"].tolist() == whole["loss/entropy"].tolist()[2:]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    start = load_file(Path(resolve_policy("embedded:arithmetic-reasoner")) / "model.safetensors")
    assert any((expected[name] - start[name]).abs().max() > 0.01 for name in start)


def test_a_rollout_grades_while_vllm_decodes(tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    monkeypatch.setattr(grading, "NOTES", notes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # leaves a core idle
    verifier = grading.verifier_of(grading.notes_its_start)
    module = vllm_module(engine=grading.waiting(VLLMEngine)(options=OPTIONS), verifier=verifier)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    assert module.engine.ended_before == 1
    assert len(notes.read_text().splitlines()) == 16  # each response once


class CrashingEngine(VLLMEngine):
    """Has vLLM ask for something impossible at its third rollout."""

    rollouts = 0

    def _sampling_params(self, request, sampling, seed):
        self.rollouts += 1
        parameters = super()._sampling_params(request, sampling, seed)
        if self.rollouts > 2 * 16:  # once for each sequence
            parameters.stop_token_ids = ["not a token"]
        return parameters


def test_a_crash_in_the_engine_ends_with_its_cause_and_a_checkpoint_to_resume_from(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100)
    module = vllm_module(engine=CrashingEngine(options=OPTIONS))
    with pytest.raises(EngineError, match="vLLM failed while it was generating: "):
        make_trainer(tmp_path, callbacks=[cached(), checkpoint], max_steps=4).fit(module, datamodule=make_data())
    assert module.engine._llm is None
    (saved,) = tmp_path.glob("*.ckpt")
    resumed = make_trainer(tmp_path / "resumed", callbacks=[cached()], max_steps=4)
    resumed.fit(vllm_module(), datamodule=make_data(), ckpt_path=saved)
    assert resumed.global_step == 4
    assert len(metrics(tmp_path / "resumed")) == 2  # updates 3 and 4


def fails_at_last(prompt: str, response: str, answer: str) -> float:
    raise ValueError("no reward for this")


@pytest.mark.parametrize("cause", ["reward", "interrupt"])
def test_an_interrupted_run_leaves_no_engine_and_no_process(tmp_path, cause):
    module = vllm_module(
        rewards=[FunctionReward(f"{__name__}.fails_at_last")] if cause == "reward" else [UniformRandomReward()]
    )
    if cause == "interrupt":

        def interrupt(*_):
            raise KeyboardInterrupt

        module._update = interrupt
    with pytest.raises(RewardError if cause == "reward" else (KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path).fit(module, datamodule=make_data())
    assert module.engine._llm is None
    assert module.engine.weights_version is None
    assert multiprocessing.active_children() == []
    assert not torch.distributed.is_initialized()


def test_truncated_sampling_is_said_to_be_incomparable_and_neither_corrected_nor_guarded(tmp_path, caplog):
    module = vllm_module(sampling=Sampling(1.0, top_p=0.9))
    assert "log-probs are those of the truncated distribution" in caplog.text
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    assert not [c for c in metrics(tmp_path).columns if c.startswith("mismatch/")]


def test_a_missing_vllm_is_one_line_with_both_ways_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigurationError, match=r"rpo-lightning\[vllm\].*rollout.vllm.install_cpu") as caught:
        make_trainer(tmp_path).fit(vllm_module(), datamodule=make_data())
    assert "\n" not in str(caught.value)
