"""The real vLLM engine: its samples, its weights, and its syncs."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.rollout import EngineSetup, GenerationRequest, Sampling, VLLMEngine
from rpo_lightning.rollout.vllm import platform as vllm_platform
from tests.policy.prefix_sharing.test_logprobs import reference_logprobs
from tests.rollout.test_transformers_engine import QUESTIONS, assert_ends_at

pytestmark = pytest.mark.long

# The kernels of vLLM and transformers both compute in fp32 and round differently.
FP32 = 1e-4


def requests(tokenizer, samples=3, budget=64):
    return [GenerationRequest(tuple(tokenizer(q)["input_ids"]), samples, budget) for q in QUESTIONS]


@pytest.fixture(scope="module")
def start(tokenizer):
    """Starts an engine for a policy, after stopping the one before: they share a process."""
    running: list[VLLMEngine] = []

    def start(policy, **settings):
        while running:
            running.pop().shutdown()
        engine = VLLMEngine(**{"options": {"max_num_seqs": 32, "block_size": 32}, **settings})
        running.append(engine)
        engine.attach(policy, tokenizer, EngineSetup(max_length=512))
        engine.load_weights(policy, version=0)
        return engine

    yield start
    while running:
        running.pop().shutdown()


def differences(asked, outputs, *policies, temperature=1.0) -> torch.Tensor:
    """Engine's log-prob minus the policy's for every sampled token, a row for each policy."""
    rows = []
    for policy in policies:
        policy.eval()
        row = []
        for request, completions in zip(asked, outputs, strict=True):
            for completion in completions:
                ids, count = request.token_ids + completion.token_ids, len(completion.token_ids)
                with torch.no_grad():
                    expected = reference_logprobs(policy, ids, count, temperature)
                row.append(torch.tensor(completion.logprobs) - expected.float())
        rows.append(torch.cat(row))
    return torch.stack(rows)


def largest_difference(engine, policy, tokenizer, temperature=1.0) -> float:
    asked = requests(tokenizer)
    outputs = engine.generate(asked, Sampling(temperature), seed=3)
    return differences(asked, outputs, policy, temperature=temperature).abs().max().item()


def change(policy, seed=0, size=0.05, only_trained=False):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad or not only_trained):
            scale = parameter.float().std() if parameter.numel() > 1 else 0.0
            parameter.add_((size * scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def untied(policy):
    """The same model with an output head of its own, which differs from the embedding."""
    config = copy.deepcopy(policy.config)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({**policy.state_dict(), "lm_head.weight": policy.lm_head.weight.detach() * 1.1})
    model.generation_config = policy.generation_config
    return model


def with_adapter(policy):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], init_lora_weights=False)
    return get_peft_model(policy, adapter)


@pytest.mark.parametrize("variant", [lambda p: p, untied, with_adapter], ids=["tied", "untied", "lora"])
def test_log_probs_equal_the_policys_after_every_change_of_weights(start, policy, tokenizer, variant):
    policy = variant(policy)
    engine = start(policy)
    assert largest_difference(engine, policy, tokenizer) < FP32
    for version in (1, 2):
        change(policy, seed=version)
        assert largest_difference(engine, policy, tokenizer) > 100 * FP32  # a stale engine is noticed
        before = {n: t.clone() for n, t in policy.state_dict().items()}
        engine.load_weights(policy, version)
        assert all(torch.equal(before[n], t) for n, t in policy.state_dict().items())
        assert largest_difference(engine, policy, tokenizer) < FP32


def test_a_bf16_engine_is_as_close_to_fp32_as_a_bf16_policy_is_and_says_if_the_processor_is_slow_in_it(
    start, policy, tokenizer, monkeypatch, caplog
):
    policy = policy.to(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    engine = start(policy)
    told = [r.getMessage() for r in caplog.records if "slow" in r.getMessage()]
    assert told == [
        "vLLM decodes in bfloat16, which is slow on this processor (no AVX-512): set model.engine.dtype to float32"
    ]
    change(policy)
    engine.load_weights(policy, 1)
    exact = copy.deepcopy(policy).float()
    asked = requests(tokenizer)
    outputs = engine.generate(asked, Sampling(), seed=3)
    to_policy, to_exact = differences(asked, outputs, policy, exact)
    rounding = (to_policy - to_exact).abs().mean()
    assert to_exact.abs().mean() < 2 * rounding
    assert to_policy.abs().mean() < 3 * rounding


def test_log_probs_are_those_at_the_sampling_temperature(start, policy, tokenizer):
    engine = start(policy)
    assert largest_difference(engine, policy, tokenizer, temperature=0.6) < FP32
    assert engine.logprob_caveat(Sampling(0.6)) is None
    assert "top_p=0.9" in engine.logprob_caveat(Sampling(1.0, top_p=0.9))
    assert "min_p=0.1" in engine.logprob_caveat(Sampling(1.0, min_p=0.1))


def test_greedy_samples_of_a_group_are_all_the_same(start, policy, tokenizer):
    greedy = start(policy).generate(requests(tokenizer), Sampling(0.0), seed=0)
    assert all(len(group) == 3 and len(set(group)) == 1 for group in greedy)


def test_sequences_end_at_the_end_token_or_at_their_own_budget(start, policy, tokenizer):
    engine = start(policy)
    budgets = (400, 3, 1)
    asked = [GenerationRequest(r.token_ids, 4, b) for r, b in zip(requests(tokenizer), budgets, strict=True)]
    outputs = engine.generate(asked, Sampling(), seed=0)
    for completion in outputs[0]:
        assert completion.finished
        assert completion.token_ids[-1] == tokenizer.eos_token_id
    for group, budget in zip(outputs[1:], budgets[1:], strict=True):
        assert all(len(c.token_ids) == len(c.logprobs) == budget and not c.finished for c in group)
    with pytest.raises(EngineError, match=r"vLLM failed while it was generating: .*512"):
        engine.generate([GenerationRequest(tuple(range(3, 30)) * 20, 1, 4)], Sampling(), seed=0)


def test_texts_and_ids_end_sequences_and_min_p_excludes_tokens_as_in_the_transformers_engine(policy, tokenizer, start):
    engine = start(policy)
    asked = requests(tokenizer, samples=1, budget=256)
    plain = engine.generate(asked, Sampling(0.0), seed=0)
    for stop in (("g", "=4"), (tokenizer.convert_tokens_to_ids("g"),)):
        engine.attach(policy, tokenizer, EngineSetup(max_length=512, stop=stop))
        stopped = engine.generate(asked, Sampling(0.0), seed=0)
        texts = ("g",) if len(stop) == 1 else stop
        assert_ends_at(texts, plain, stopped, tokenizer, tokenizer.eos_token_id)
    # A token that is less likely than the likeliest is excluded at min_p=1, so samples are greedy.
    assert [c.token_ids for (c,) in engine.generate(asked, Sampling(1.0, min_p=1.0), seed=1)] == [
        c.token_ids for (c,) in stopped
    ]


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(start, policy, tokenizer):
    engine = start(policy)
    first = engine.generate(requests(tokenizer), Sampling(), seed=1)
    assert engine.generate(requests(tokenizer), Sampling(), seed=2) != first
    assert len(set(first[0])) == 3
    fresh = start(policy)
    again = fresh.generate(requests(tokenizer), Sampling(), seed=1)
    assert [[c.token_ids for c in g] for g in again] == [[c.token_ids for c in g] for g in first]


def test_the_prefix_cache_hits_within_an_iteration_and_never_across_a_sync(start, policy, tokenizer):
    engine = start(policy)
    prompt = tuple(tokenizer(QUESTIONS[0])["input_ids"])
    long = GenerationRequest((prompt * 10)[:200], n=4, max_new_tokens=4)
    engine.metrics()
    engine.generate([long], Sampling(), seed=0)
    # Three of four samples find all full blocks (32 tokens each) except the last.
    assert engine.metrics()["rollout/prefix_cache_hit_share"] == pytest.approx(3 / 4 * 192 / 200)
    one = GenerationRequest(long.token_ids, 1, 4)
    engine.generate([one], Sampling(), seed=1)
    assert engine.metrics()["rollout/prefix_cache_hit_share"] == pytest.approx(192 / 200)
    engine.load_weights(policy, 1)
    engine.generate([one], Sampling(), seed=1)
    assert engine.metrics()["rollout/prefix_cache_hit_share"] == 0


def test_rollouts_and_syncs_draw_nothing_from_the_trainers_generators(policy, tokenizer, start):
    engine = start(policy)
    states = random.getstate(), torch.get_rng_state().tolist()
    engine.generate(requests(tokenizer), Sampling(), seed=0)
    engine.load_weights(policy, 1)
    assert (random.getstate(), torch.get_rng_state().tolist()) == states


def test_starting_an_engine_leaves_the_process_as_it_was(policy, tokenizer, start):
    state, threads, set_threads = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    start(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_threads)


def test_an_engine_that_was_shut_down_asks_for_a_sync_and_starts_anew(start, policy, tokenizer):
    engine = start(policy)
    engine.shutdown()
    assert engine.weights_version is None
    with pytest.raises(EngineError, match="before it was synced"):
        engine.generate(requests(tokenizer), Sampling(), seed=0)
    engine.load_weights(policy, 0)
    assert largest_difference(engine, policy, tokenizer) < FP32


def test_sleep_that_the_platform_cannot_is_said_and_changes_nothing(start, policy, tokenizer, caplog):
    engine = start(policy, sleep_level=2)
    if vllm_platform.on_cpu():
        assert "cannot sleep on a CPU" in caplog.text
    assert engine.sleep_level == 2  # the setting stays for later engines
    engine.sleep()
    engine.wake()
    engine.load_weights(policy, 1)
    assert largest_difference(engine, policy, tokenizer) < FP32


def test_a_second_engine_that_could_sleep_stays_awake_with_a_warning(monkeypatch, caplog):
    """vLLM's allocator refuses a second engine in a process. It says how much memory it holds."""
    from vllm.device_allocator.cumem import CuMemAllocator

    held = SimpleNamespace(get_current_usage=lambda: 1)
    monkeypatch.setattr("rpo_lightning.rollout.vllm.platform.on_cpu", lambda: False)
    assert VLLMEngine()._supported_sleep_level() == 2
    monkeypatch.setattr(CuMemAllocator, "instance", held)
    assert VLLMEngine(sleep_level=2)._supported_sleep_level() == 0
    assert "stays awake" in caplog.text
    caplog.clear()
    assert VLLMEngine(sleep_level=0)._supported_sleep_level() == 0
    held.get_current_usage = lambda: 0
    assert VLLMEngine(sleep_level=2)._supported_sleep_level() == 2
    assert not caplog.records


def test_a_policy_on_a_gpu_that_vllm_would_not_take_is_refused():
    from rpo_lightning.rollout.vllm.platform import require_own_device

    require_own_device(torch.device("cuda", 0), EngineSetup())
    require_own_device(torch.device("cuda", 1), EngineSetup(rank=1, local_rank=1, world_size=2))
    for context in (EngineSetup(), EngineSetup(rank=0, local_rank=0, world_size=2)):
        with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES"):
            require_own_device(torch.device("cuda", 2), context)
