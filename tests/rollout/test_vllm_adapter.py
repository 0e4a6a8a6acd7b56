"""Adapters on the real vLLM: what a sync gives it, what it computes with, and which adapters are refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.rollout import EngineSetup, GenerationRequest, Sampling, VLLMEngine
from rpo_lightning.rollout.vllm import platform as vllm_platform
from rpo_lightning.rollout.vllm import weight_transfer
from tests.conftest import REASONER
from tests.rollout.test_vllm_engine import (
    FP32,
    QUESTIONS,
    change,
    differences,
    largest_difference,
    requests,
    start,
    untied,
)

pytestmark = pytest.mark.long
__all__ = ["start"]  # a fixture


# bitsandbytes multiplies 4-bit weights in another order.
QUANTISED = 1e-3


def adapted(policy, **lora):
    """A policy with an adapter that changes it."""
    torch.manual_seed(0)
    options = {"init_lora_weights": False, **lora.pop("options", {})}
    return LoRA(**{"rank": 4, "alpha": 8, **lora}, options=options).apply(policy)


def update(policy, seed):
    """Change what trains."""
    change(policy, seed, size=0.3, only_trained=True)


def trained_bytes(policy):
    return sum(p.nbytes for p in policy.parameters() if p.requires_grad)


def all_bytes(policy):
    """Of the base, whose tied weight is given under both of its names, and of the adapter."""
    model = policy.get_base_model()
    tied = model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
    return tied + sum(p.nbytes for p in policy.parameters())


@pytest.fixture(scope="module")
def running(start):
    """An engine that is given adapters of all linear layers, and its policy."""
    policy = adapted(load_policy(REASONER))
    return start(policy, sync="adapter"), policy


def sync(engine, policy):
    engine.load_weights(policy, (engine.weights_version or 0) + 1)


def test_after_every_change_only_the_adapter_is_given_and_log_probs_equal_the_policys(running, tokenizer):
    engine, policy = running
    assert engine.synced_bytes == all_bytes(policy)
    assert largest_difference(engine, policy, tokenizer) < FP32
    for seed in (1, 2, 3):
        update(policy, seed)
        assert largest_difference(engine, policy, tokenizer) > 100 * FP32  # a stale engine is noticed
        before = {n: t.clone() for n, t in policy.state_dict().items()}
        sync(engine, policy)
        assert all(torch.equal(before[n], t) for n, t in policy.state_dict().items())
        assert engine.synced_bytes == trained_bytes(policy) < 0.1 * all_bytes(policy)
        assert len(engine._llm.llm_engine.list_loras()) == 1  # the adapter before is gone
        assert largest_difference(engine, policy, tokenizer) < FP32


def test_the_prefix_cache_never_gives_what_an_earlier_adapter_computed(running, tokenizer):
    engine, policy = running
    prompt = tuple(tokenizer(QUESTIONS[0])["input_ids"])
    long = [GenerationRequest((prompt * 10)[:200], n=4, max_new_tokens=4)]
    sync(engine, policy)
    for seed in (4, 5):
        engine.metrics()
        outputs = engine.generate(long, Sampling(), seed=0)
        assert engine.metrics()["rollout/prefix_cache_hit_share"] == pytest.approx(3 / 4 * 192 / 200)
        assert differences(long, outputs, policy).abs().max() < FP32
        before = engine._transfer.request.lora_name
        update(policy, seed)
        sync(engine, policy)
        assert engine._transfer.request.lora_name != before  # part of the keys of the prefix cache


def test_a_sync_that_fails_leaves_nothing_to_generate_with_and_no_folder(running, tokenizer, monkeypatch):
    engine, policy = running
    folders, write = [], weight_transfer._write_adapter
    with monkeypatch.context() as context:
        context.setattr(weight_transfer, "_write_adapter", lambda folder, *_: folders.append(folder))
        with pytest.raises(EngineError, match=r"did not load the policy's weights: .*set model.engine.sync=merged"):
            sync(engine, policy)
    with pytest.raises(EngineError, match="before it was synced"):
        engine.generate(requests(tokenizer), Sampling(), seed=0)
    # Without shared memory it is a temporary folder.
    monkeypatch.setattr(weight_transfer, "_SHARED_MEMORY", folders[0] / "none")
    monkeypatch.setattr(
        weight_transfer, "_write_adapter", lambda folder, *args: (folders.append(folder), write(folder, *args))
    )
    sync(engine, policy)
    assert [folder.exists() for folder in folders] == [False, False]
    assert folders[0].parent != folders[1].parent
    assert largest_difference(engine, policy, tokenizer) < FP32


def test_an_engine_that_cannot_sleep_keeps_the_base_and_one_that_starts_anew_is_given_it(running, tokenizer):
    engine, policy = running
    engine.sleep()
    engine.wake()
    sync(engine, policy)
    assert engine.synced_bytes == trained_bytes(policy)
    engine.shutdown()
    sync(engine, policy)
    assert engine.synced_bytes == all_bytes(policy)
    assert largest_difference(engine, policy, tokenizer) < FP32


def uneven():
    """An untied policy, with ranks and scales that differ between layers, and an adapted output head."""
    own = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"down_proj": 3}}
    layers = ["q_proj", "up_proj", "down_proj", "lm_head"]
    return adapted(untied(load_policy(REASONER)), target_modules=layers, options={**own, "use_rslora": True})


def quantised():
    lora = LoRA(rank=4, quantization="4bit", options={"init_lora_weights": False})
    return lora.apply(load_policy(REASONER, **lora.loading_options()))


@pytest.mark.parametrize(("other", "largest"), [(uneven, FP32), (quantised, QUANTISED)])
def test_another_policy_restarts_the_engine_with_its_base_and_its_adapter(running, tokenizer, other, largest):
    if other is quantised:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
    engine, _ = running
    policy = other()
    engine.attach(policy, tokenizer, EngineSetup(max_length=512))
    sync(engine, policy)
    assert largest_difference(engine, policy, tokenizer) < largest
    update(policy, seed=1)
    sync(engine, policy)
    assert engine.synced_bytes == trained_bytes(policy)
    assert largest_difference(engine, policy, tokenizer) < largest


def test_samples_and_log_probs_equal_those_of_merged_weights(running, start, tokenizer):
    engine, _ = running
    policy = adapted(load_policy(REASONER))
    asked, found = requests(tokenizer), []
    engine.attach(policy, tokenizer, EngineSetup(max_length=512))
    sync(engine, policy)
    found.append(engine.generate(asked, Sampling(), seed=3))
    found.append(start(policy, sync="merged").generate(asked, Sampling(), seed=3))
    assert [[c.token_ids for c in group] for group in found[0]] == [[c.token_ids for c in group] for group in found[1]]
    added, merged = (torch.tensor([p for g in groups for c in g for p in c.logprobs]) for groups in found)
    torch.testing.assert_close(added, merged, atol=FP32, rtol=0)


def test_a_layer_that_vllm_would_compute_without_its_adapter_is_an_error(start, policy):
    options = {"max_num_seqs": 32, "block_size": 32, "lora_target_modules": ["o_proj", "down_proj"]}
    with pytest.raises(ConfigurationError, match=r"no layer model\.layers\.0\.mlp\.gate_proj that takes an adapter"):
        start(adapted(policy), sync="adapter", options=options)


def several(policy):
    both = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    both.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    both.base_model.set_adapter(["first", "second"])
    return both


REFUSED = {
    "no adapter": (lambda p: p, "the policy has no adapter: set model.adapter=LoRA"),
    "a module that trains as a whole": (
        lambda p: adapted(p, target_modules=["q_proj"], options={"modules_to_save": ["norm"]}),
        r"norm\.modules_to_save\.default\.weight trains besides .* from model\.adapter\.options \(modules_to_save",
    ),
    "single tokens": (
        lambda p: adapted(untied(p), target_modules=["q_proj"], options={"trainable_token_indices": [3]}),
        r"embed_tokens\.token_adapter is no linear layer with LoRA \(TrainableTokensLayer\)",
    ),
    "an embedding": (
        lambda p: adapted(untied(p), target_modules=["q_proj", "embed_tokens"]),
        r"model\.embed_tokens is no linear layer with LoRA \(Embedding\): leave it out of model\.adapter",
    ),
    "DoRA": (
        lambda p: adapted(p, target_modules=["q_proj"], options={"use_dora": True}),
        r"q_proj has Dora, .* remove it from model\.adapter\.options",
    ),
    "a rank that is too high": (
        lambda p: adapted(p, target_modules=["q_proj"], options={"rank_pattern": {"layers.1.self_attn.q_proj": 600}}),
        "the adapter has rank 600, and vLLM serves at most 512",
    ),
    "several adapters": (several, r"has 2 active adapters \(first, second\): activate one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_serve_is_refused_in_a_line_with_both_remedies(policy, tokenizer, case):
    variant, told = REFUSED[case]
    with pytest.raises(ConfigurationError, match=told) as caught:
        VLLMEngine(sync="adapter").attach(variant(policy), tokenizer, EngineSetup(max_length=512))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("model.engine.sync=adapter: ")
    assert line.endswith(", or set model.engine.sync=merged")


def test_an_engine_limits_ranks_as_its_options_do_and_other_settings_and_versions_are_refused(
    policy, tokenizer, monkeypatch
):
    policy = adapted(policy)
    with pytest.raises(ConfigurationError, match="vLLM serves at most 1"):
        VLLMEngine(sync="adapter", options={"max_lora_rank": 1}).attach(policy, tokenizer)
    with pytest.raises(ConfigurationError, match="must be one of merged, adapter; got 'both'"):
        VLLMEngine(sync="both")
    monkeypatch.setattr(vllm_platform, "_version", lambda: (0, 24))
    with pytest.raises(ConfigurationError, match=r"needs vLLM 0\.32 or newer, .* or set model\.engine\.sync=merged"):
        VLLMEngine(sync="adapter").attach(policy, tokenizer)
