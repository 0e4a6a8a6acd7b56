"""Checkpoints and cache files of earlier releases load: ``tests/saved/`` holds one of each.

They come from three updates of a tiny random model with dynamic sampling, before modules were moved into rooms.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache import UniformCut, read_cache
from rpo_lightning.callbacks import RunSummaryCallback
from rpo_lightning.data import ArithmeticChain
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from tests.conftest import cache_contents, make_data, make_module, make_trainer

SAVED = Path(__file__).parents[1] / "saved"


def resumed(tmp_path, tokenizer, max_steps: int):
    """The run of the saved checkpoint, gone on with."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    cache = ExperienceCacheCallback(cut=UniformCut(6), initialisation="lazy", keep_unfinished=True)
    module = make_module(
        policy=LlamaForCausalLM(config), tokenizer=tokenizer, rewards=[UniformRandomReward()], group_size=2,
        max_response_tokens=12, dynamic_sampling=DynamicSampling(filter="reward"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )  # fmt: skip
    data = make_data(train=ArithmeticChain(size=8, seed=1, operations=3), batch_size=2)
    trainer = make_trainer(tmp_path, max_steps=max_steps, callbacks=[cache, RunSummaryCallback(), ModelCheckpoint()])
    trainer.fit(module, datamodule=data, ckpt_path=str(SAVED / "checkpoint.ckpt"), weights_only=True)
    return trainer, module, cache


def test_a_checkpoint_of_an_earlier_release_is_resumed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    _, module, cache = resumed(tmp_path / "loaded", tokenizer, max_steps=3)  # nothing left to train
    saved = torch.load(SAVED / "checkpoint.ckpt", weights_only=True)
    assert module.iteration == saved["rpo"]["iteration"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, saved["state_dict"][name], rtol=0, atol=0)
    of_file = read_cache(SAVED / "cache.parquet", tokenizer_fingerprint(tokenizer))
    assert cache_contents(cache.cache) == cache_contents(of_file)

    trainer, module, cache = resumed(tmp_path / "trained", tokenizer, max_steps=5)
    assert trainer.global_step == 5
    assert module.iteration > saved["rpo"]["iteration"]
    prefixes = [g.request.prefix_ids for g in module.groups]
    assert any(prefixes), "the cached responses are cut into prefixes"


def test_a_cache_file_of_an_earlier_release_is_read(tokenizer):
    cache = read_cache(SAVED / "cache.parquet", tokenizer_fingerprint(tokenizer))
    assert len(cache) == 6
    assert all(entry.response is not None and len(entry.response) for entry in cache)


@pytest.mark.parametrize("name", ["checkpoint.ckpt", "cache.parquet"])
def test_the_saved_files_are_small(name):
    assert (SAVED / name).stat().st_size < 100_000
