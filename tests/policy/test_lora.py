"""LoRA and QLoRA: which parameters train, which reference they have, which files are saved."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache.cuts import FractionOfShortestCut
from rpo_lightning.callbacks import HuggingFaceExportCallback
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.update.mismatch import MismatchBound
from rpo_lightning.update.objectives import GRPO
from tests.conftest import REASONER, make_data, make_module, make_trainer

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])


def adapted_run(folder, stop: int, resume=None, **lora):
    module = make_module(
        adapter=LoRA(rank=4, **lora),
        rewards=[UniformRandomReward()],
        # bitsandbytes is slow on a CPU, and nothing here needs whole answers.
        max_response_tokens=24,
        objective=GRPO(beta=0.1),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        # 8-bit products depend on what else is computed with them, see LoRA.
        mismatch_bound=MismatchBound(jump=1000.0 if lora.get("quantization") == "8bit" else 10.0),
    )
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    cache = ExperienceCacheCallback(cut=FractionOfShortestCut(0.5), initialisation="lazy", keep_unfinished=True)
    export = HuggingFaceExportCallback(every_n_steps=1, merged=False)
    trainer = make_trainer(folder, max_steps=stop, callbacks=[cache, checkpoint, export])
    trainer.fit(module, datamodule=make_data(batch_size=2), ckpt_path=resume, weights_only=True if resume else None)
    return module


def metrics(folder) -> pd.DataFrame:
    log = pd.read_csv(folder / "metrics.csv")
    return log[log["loss/total"].notna()]


def logits(policy) -> torch.Tensor:
    policy.eval()
    with torch.no_grad():
        return policy(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def adapted_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    adapted_run(folder, 1)
    return folder / "step=1.ckpt"


def test_only_the_adapter_trains_and_the_reference_is_the_policy_without_it(tmp_path):
    module = adapted_run(tmp_path, 3)
    start = load_policy(REASONER)
    for name, parameter in module.policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    assert not torch.allclose(logits(module.policy), logits(start), atol=1e-3)
    with module.policy.disable_adapter():
        assert torch.equal(logits(module.policy), logits(start))
    kl = metrics(tmp_path)["loss/kl"]
    assert kl.iloc[0] == pytest.approx(0.0, abs=1e-6)
    assert kl.iloc[-1] > 1e-6


def test_the_adapter_alone_and_the_merged_policy_answer_alike(tmp_path):
    from peft import PeftModel

    module = adapted_run(tmp_path, 1)
    module.save_pretrained(tmp_path / "merged")
    merged = load_policy(str(tmp_path / "merged"))
    alone = PeftModel.from_pretrained(load_policy(REASONER), tmp_path / "policy")
    expected = logits(module.policy)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(alone), expected, atol=1e-5, rtol=0)
    assert not (tmp_path / "policy" / "model.safetensors").exists()


def test_a_checkpoint_holds_the_adapter_and_resumes_exactly(tmp_path):
    whole = adapted_run(tmp_path / "whole", 3)
    saved = tmp_path / "whole" / "step=2.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    resumed = adapted_run(tmp_path / "resumed", 3, resume=saved)
    found = dict(resumed.policy.named_parameters())
    assert all(torch.equal(parameter, found[name]) for name, parameter in whole.policy.named_parameters())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"adapter": LoRA(rank=8)},
            r"lora_A.* has shape \[4, \d+\] in the checkpoint and shape \[8, \d+\] in this run",
        ),
        ({"adapter": LoRA(rank=4, target_modules=["q_proj"])}, "in the checkpoint and no such parameter in this run"),
        ({}, "model.adapter as in the run that wrote it"),
    ],
    ids=["other rank", "other layers", "no adapter"],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_of_another_adapter_is_refused_in_a_line(adapted_checkpoint, tmp_path, stage, settings, told):
    run = getattr(make_trainer(tmp_path, max_steps=2), stage)
    with pytest.raises(ConfigurationError, match=told):
        run(make_module(**settings), datamodule=make_data(), ckpt_path=adapted_checkpoint, weights_only=True)


def test_a_policy_is_saved_beside_other_files_and_in_place_of_an_earlier_one(tmp_path):
    module = make_module()
    module.configure_model()
    notes = tmp_path / "notes" / "plan.txt"
    notes.parent.mkdir()
    for path in (notes, tmp_path / "README.md"):
        path.write_text("mine")
    (tmp_path / "chat_template.jinja").write_text("of an earlier tokenizer")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in shards:
        (tmp_path / name).write_text("of an earlier policy")
    module.save_pretrained(tmp_path)
    assert (notes.read_text(), (tmp_path / "README.md").read_text()) == ("mine", "mine")
    assert not any((tmp_path / name).exists() for name in shards)
    assert load_tokenizer(str(tmp_path)).chat_template == module.tokenizer.chat_template
    assert torch.equal(logits(load_policy(str(tmp_path))), logits(module.policy))
    assert not [*tmp_path.parent.glob("*.partial"), *tmp_path.glob(".partial")]


def test_a_policy_is_saved_where_one_stands_and_through_a_link(tmp_path, monkeypatch):
    module = make_module()
    module.configure_model()
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    module.save_pretrained(".")
    module.save_pretrained(tmp_path / "link")
    for name in ("here", "there"):
        assert torch.equal(logits(load_policy(str(tmp_path / name))), logits(module.policy))


def test_a_run_that_could_not_save_its_policy_ends_before_it_begins(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="save into another folder"):
        adapted_run(tmp_path, 1)
    assert not (tmp_path / "step=1.ckpt").exists()


def test_an_adapter_and_a_policy_are_not_saved_into_one_folder(tmp_path):
    module = make_module(adapter=LoRA(rank=4))
    module.configure_model()
    module.save_pretrained(tmp_path / "whole")
    module.save_pretrained(tmp_path / "adapter", merged=False)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, merged in (("whole", False), ("weights", False), ("adapter", True)):
        with pytest.raises(ConfigurationError, match="save into another folder"):
            module.save_pretrained(tmp_path / folder, merged)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_policy_trains_and_is_saved_in_full_precision(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    module = adapted_run(tmp_path, 2, quantization=quantization)
    assert metrics(tmp_path)["loss/grad_norm"].gt(0).any()
    module.save_pretrained(tmp_path / "merged")
    merged = load_policy(str(tmp_path / "merged"))
    assert not hasattr(merged.config, "quantization_config")
    # 8-bit products round their inputs too.
    tolerance = 1e-3 if quantization == "4bit" else 0.5
    torch.testing.assert_close(logits(merged), logits(module.policy).float(), atol=tolerance, rtol=0)


def test_target_modules_that_are_not_there_are_told():
    module = make_module(adapter=LoRA(target_modules=["nothing"]))
    with pytest.raises(ConfigurationError, match=r"model\.adapter: .*nothing"):
        module.configure_model()


class Precisions(Callback):
    """Notes the dtypes of the adapter, the policy and the optimizer while training."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trained = [p for p in pl_module.policy.parameters() if p.requires_grad]
        constant = [p for p in pl_module.policy.parameters() if not p.requires_grad]
        states = [s["exp_avg"].dtype for s in trainer.optimizers[0].state.values()]
        self.seen = {p.dtype for p in trained}, {p.dtype for p in constant}, set(states)


def test_an_adapter_stays_in_fp32_beside_a_bf16_policy_and_log_probs_are_not_rounded(tmp_path):
    precisions = Precisions()
    module = make_module(
        adapter=LoRA(rank=4), rewards=[UniformRandomReward()], passes_per_rollout=2, max_response_tokens=24,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
    )  # fmt: skip
    trainer = make_trainer(tmp_path, max_steps=2, precision="bf16-true", callbacks=[precisions])
    trainer.fit(module, datamodule=make_data())
    assert precisions.seen == ({torch.float32}, {torch.bfloat16}, {torch.float32})
    log = pd.read_csv(tmp_path / "metrics.csv")
    # The policy did not change: the second pass gets the old log-probs exactly, not rounded to bf16.
    assert log["loss/ratio_deviation_max"].iloc[-1] < 1e-6
