"""The transformers engine samples from the policy and reports the policy's log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.data.arithmetic import draw_problem
from rpo_lightning.rollout import EngineSetup, GenerationRequest, Sampling, TransformersEngine
from rpo_lightning.rollout.transformers import attention as decode_attention
from rpo_lightning.rollout.transformers import engine as transformers_engine
from rpo_lightning.rollout.transformers import sequence_cache
from rpo_lightning.rollout.transformers.growing_cache import growing_cache
from rpo_lightning.rollout.transformers.sampling import draw
from tests.policy.prefix_sharing.test_logprobs import reference_logprobs

# Questions of different lengths, which makes the engine pad prompts.
QUESTIONS = [draw_problem(np.random.default_rng(seed), steps).question for seed, steps in ((0, 24), (1, 20), (8, 22))]


@pytest.fixture
def engine(policy, tokenizer):
    engine = TransformersEngine()
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, version=0)
    return engine


def requests(tokenizer, samples=3, budget=256):
    return [GenerationRequest(tuple(tokenizer(q)["input_ids"]), samples, budget) for q in QUESTIONS]


def test_greedy_decoding_equals_transformers_generate(engine, policy, tokenizer):
    outputs = engine.generate(requests(tokenizer, samples=1), Sampling(temperature=0), seed=0)
    for question, (completion,) in zip(QUESTIONS, outputs, strict=True):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        expected = policy.eval().generate(ids, do_sample=False, max_new_tokens=256)[0, ids.shape[1] :]
        assert list(completion.token_ids) == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_temperature_scaled_policys(engine, policy, tokenizer, temperature):
    asked = requests(tokenizer)
    for request, completions in zip(asked, engine.generate(asked, Sampling(temperature), seed=1), strict=True):
        for completion in completions:
            row = request.token_ids + completion.token_ids
            expected = reference_logprobs(policy, row, len(completion.token_ids), temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=0)


def test_log_probs_stay_the_policys_under_top_p_and_top_k(engine, policy, tokenizer):
    asked = requests(tokenizer, samples=2)
    outputs = engine.generate(asked, Sampling(1.0, top_p=0.9, top_k=3), seed=1)
    completion = outputs[0][0]
    expected = reference_logprobs(policy, asked[0].token_ids + completion.token_ids, len(completion.token_ids))
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-4, rtol=0)


@pytest.fixture
def grouped_policy():
    """A policy with two query heads a key head, and weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def generated(policy, tokenizer, asked, temperature=1.0):
    engine = TransformersEngine()
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, version=0)
    return engine.generate(asked, Sampling(temperature), seed=1)


def assert_log_probs_are_the_policys(policy, asked, outputs):
    """Check to rounding. Log-probs are -3 to -10 in fp32; rows are padded here and single in the reference."""
    for request, completions in zip(asked, outputs, strict=True):
        assert len(completions) == request.n
        for completion in completions:
            row = request.token_ids + completion.token_ids
            expected = reference_logprobs(policy, row, len(completion.token_ids))
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_grouped_heads_decode_as_the_policy_computes_without_copies_of_keys(
    grouped_policy, tokenizer, monkeypatch, attention
):
    grouped_policy.set_attn_implementation(attention)
    heads = []

    def note(query, key, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1]))
        return scaled_dot_product_attention(query, key, *args, **kwargs)

    monkeypatch.setattr(decode_attention, "scaled_dot_product_attention", note)
    asked = requests(tokenizer, samples=2, budget=40)
    assert_log_probs_are_the_policys(grouped_policy, asked, generated(grouped_policy, tokenizer, asked))
    assert set(heads) == (set() if attention == "eager" else {(2, 2)})
    assert grouped_policy.config._attn_implementation == attention


@pytest.fixture(params=["the CPU's kernel", "matrix products"])
def read_keys(request, monkeypatch):
    """Shapes of the keys that decoding reads, for both ways to compute a part of its attention."""
    shapes = []
    by_products = request.param == "matrix products"
    part = decode_attention.attended_by_products if by_products else decode_attention.attended

    def note(query, key, *args):
        shapes.append(tuple(key.shape[:3]))
        return part(query, key, *args)

    def tried(policy):
        can_be_shared = sequence_cache.contexts_can_be_shared(policy)
        shapes.clear()  # drops those of the trial
        return can_be_shared

    monkeypatch.setattr(decode_attention, "attended", note)
    monkeypatch.setattr(transformers_engine, "contexts_can_be_shared", tried)
    monkeypatch.setattr(sequence_cache, "_BYTES_WORTH_SHARING", 0)
    return shapes


def test_members_of_a_group_read_one_copy_of_their_prompt_until_the_last_of_them_ends(
    grouped_policy, tokenizer, read_keys
):
    grouped_policy.set_attn_implementation("rpo_shared_prefix")
    sizes = zip(QUESTIONS, (3, 5, 1), (40, 5, 20), strict=True)
    asked = [GenerationRequest(tuple(tokenizer(q)["input_ids"]), samples, budget) for q, samples, budget in sizes]
    longest = max(len(r.token_ids) for r in asked)
    outputs = generated(grouped_policy, tokenizer, asked)
    assert_log_probs_are_the_policys(grouped_policy, asked, outputs)
    contexts, own = set(read_keys[::2]), set(read_keys[1::2])
    assert {shape[1:] for shape in contexts} == {(2, longest)}
    assert max(rows for rows, *_ in contexts) == 3
    assert min(rows for rows, *_ in contexts) == 1  # the other contexts were dropped with their last sequence
    assert max(rows for rows, *_ in own) == 9
    assert max(tokens for *_, tokens in own) < 40
    assert grouped_policy.config._attn_implementation == "rpo_shared_prefix"


def test_shared_prompts_decode_greedily_as_transformers_generate(policy, tokenizer, read_keys):
    policy.set_attn_implementation("rpo_shared_prefix")
    outputs = generated(policy, tokenizer, requests(tokenizer, samples=2), temperature=0)
    for question, completions in zip(QUESTIONS, outputs, strict=True):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        expected = policy.eval().generate(ids, do_sample=False, max_new_tokens=256)[0, ids.shape[1] :]
        assert [list(c.token_ids) for c in completions] == [expected.tolist()] * 2
    assert read_keys


@pytest.mark.parametrize(("beyond", "is_shared"), [(0, True), (1, False)])
def test_sequences_have_copies_of_their_prompts_where_these_are_small(
    grouped_policy, tokenizer, read_keys, monkeypatch, beyond, is_shared
):
    grouped_policy.set_attn_implementation("rpo_shared_prefix")
    asked = requests(tokenizer, samples=3, budget=10)
    longest = max(len(r.token_ids) for r in asked)
    copied_bytes = 6 * longest * 2 * 2 * 16 * 4  # 6 copies of 2 heads' keys and values, 16 fp32 numbers each
    monkeypatch.setattr(sequence_cache, "_BYTES_WORTH_SHARING", copied_bytes + beyond)
    assert_log_probs_are_the_policys(grouped_policy, asked, generated(grouped_policy, tokenizer, asked))
    assert bool(read_keys) == is_shared


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32])  # fp32 where they are normalised
def test_shared_prompts_decode_under_autocast(grouped_policy, tokenizer, read_keys, values):
    grouped_policy.set_attn_implementation("rpo_shared_prefix")

    def normalised(module, given, output):
        return output.to(values) if torch.is_autocast_enabled("cpu") else output

    for layer in grouped_policy.model.layers:
        layer.self_attn.v_proj.register_forward_hook(normalised)
    asked = requests(tokenizer, samples=2, budget=20)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = generated(grouped_policy, tokenizer, asked)
    assert read_keys
    for request, completions in zip(asked, outputs, strict=True):
        for completion in completions:
            row = request.token_ids + completion.token_ids
            expected = reference_logprobs(grouped_policy, row, len(completion.token_ids))
            difference = (torch.tensor(completion.logprobs) - expected).abs().mean()
            assert difference < 0.15  # logits have a standard deviation of 2; bf16 keeps 8 bits


def test_under_autocast_keys_are_stored_in_the_precision_of_values(grouped_policy):
    cache = growing_cache(grouped_policy.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for token in (3, 4):
            grouped_policy(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert [(x.keys.dtype, x.get_seq_length()) for x in cache.layers] == [(torch.bfloat16, 2)] * 2


def test_sequences_end_at_the_end_token_or_at_their_own_budget(engine, tokenizer):
    asked = [
        GenerationRequest(tuple(tokenizer(q)["input_ids"]), 4, b) for q, b in zip(QUESTIONS, (256, 3, 1), strict=True)
    ]
    outputs = engine.generate(asked, Sampling(), seed=0)
    for request, completions in zip(asked, outputs, strict=True):
        for completion in completions:
            assert 1 <= len(completion.token_ids) <= request.max_new_tokens
            assert completion.finished == (completion.token_ids[-1] == tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in completion.token_ids[:-1]
            assert len(completion.logprobs) == len(completion.token_ids)
    assert [len(c.token_ids) for c in outputs[1] + outputs[2]] == [3] * 4 + [1] * 4
    assert all(c.finished for c in outputs[0])


def until(text, stop):
    """What is left of a text up to the end of the first stop text in it, and whether there is one."""
    ends = [text.index(part) + len(part) for part in stop if part in text]
    return text[: min(ends, default=len(text))], bool(ends)


def assert_ends_at(stop, plain, stopped, tokenizer, eos):
    """Greedy sequences end at the first stop text, however many tokens it has; those without one end as ever."""
    told = []
    for before, after in zip(plain, stopped, strict=True):
        (ids,), (completion,) = [c.token_ids for c in before], after
        texts = [tokenizer.decode([i]) for i in ids]
        expected, is_cut = until("".join(texts), stop)
        assert "".join(texts[: len(completion.token_ids)]) == expected
        assert ids[: len(completion.token_ids)] == completion.token_ids
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.finished == (is_cut or completion.token_ids[-1] == eos)
        told.append(is_cut)
    assert any(told)


# A chain has a step g, results that begin with 4, and "#" before the answer.
@pytest.mark.parametrize("stop", [("=4",), ("g",), ("g", "=4", "#"), ("never",), ("7=", "g")])
def test_sequences_end_at_a_stop_text_of_any_number_of_tokens(policy, tokenizer, stop):
    engine = TransformersEngine()
    asked = requests(tokenizer, samples=1)
    outputs = []
    for setup in (EngineSetup(), EngineSetup(stop=stop)):
        engine.attach(policy, tokenizer, setup)
        engine.load_weights(policy, version=0)
        outputs.append(engine.generate(asked, Sampling(temperature=0), seed=0))
    if stop == ("never",):
        assert outputs[0] == outputs[1]
    else:
        assert_ends_at(stop, *outputs, tokenizer, tokenizer.eos_token_id)


def test_a_stop_id_ends_as_the_token_does_and_the_context_ends_nothing(policy, tokenizer):
    engine = TransformersEngine()
    asked = requests(tokenizer, samples=1)  # their questions have every step name
    outputs = []
    for stop in ((tokenizer.convert_tokens_to_ids("g"),), ("g",)):
        engine.attach(policy, tokenizer, EngineSetup(stop=stop))
        engine.load_weights(policy, version=0)
        outputs.append(engine.generate(asked, Sampling(temperature=0), seed=0))
    assert outputs[0] == outputs[1]
    assert all(len(c.token_ids) > 10 and c.finished for (c,) in outputs[0])


def test_a_text_that_the_policy_cannot_write_is_refused(policy, tokenizer):
    with pytest.raises(ConfigurationError, match=r"model\.stop=\['☃'\]: .* cannot write it"):
        TransformersEngine().attach(policy, tokenizer, EngineSetup(stop=("☃",)))


def test_same_seed_same_rollouts_and_another_seed_others(engine, tokenizer):
    first, again, other = (engine.generate(requests(tokenizer), Sampling(), seed=s) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_results_come_in_the_order_of_requests_whatever_the_batches(policy, tokenizer):
    engine = TransformersEngine(max_sequences=2)
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, version=0)
    asked = requests(tokenizer, samples=1)
    small = engine.generate(asked, Sampling(temperature=0), seed=0)
    engine.max_sequences = 100
    large = engine.generate(asked, Sampling(temperature=0), seed=0)
    assert [[c.token_ids for c in cs] for cs in small] == [[c.token_ids for c in cs] for cs in large]


def test_each_prompt_is_prefilled_once_for_its_group(engine, policy, tokenizer, monkeypatch):
    shapes = []
    forward = policy.forward
    monkeypatch.setattr(
        policy, "forward", lambda *a, **k: (shapes.append(tuple(k["input_ids"].shape)), forward(*a, **k))[1]
    )
    engine.generate(requests(tokenizer, samples=5), Sampling(), seed=0)
    assert shapes[0][0] == len(QUESTIONS)
    assert all(width == 1 for _, width in shapes[1:])
    assert shapes[1][0] == 5 * len(QUESTIONS)
    assert shapes[-1][0] < shapes[1][0]  # finished sequences leave the batch


def test_the_growing_cache_equals_transformers_own(policy):
    ids = torch.randint(4, 40, (2, 300))
    cache = growing_cache(policy.config)
    with torch.no_grad():
        expected = policy(input_ids=ids).logits[:, -1]
        policy(input_ids=ids[:, :100], past_key_values=cache, use_cache=True)
        for i in range(100, 300):
            logits = policy(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


HYBRIDS = {
    "linear attention": (Qwen3NextForCausalLM, Qwen3NextConfig, {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }),
    "convolutions": (Lfm2ForCausalLM, Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "both in every layer": (FalconH1ForCausalLM, FalconH1Config, {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_that_keep_a_state_instead_of_every_token_decode_as_the_policy_computes(tokenizer, kind):
    architecture, configuration, settings = HYBRIDS[kind]
    torch.manual_seed(0)
    config = configuration(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
        **settings,
    )  # fmt: skip
    policy = architecture(config)
    asked = requests(tokenizer, samples=2, budget=12)
    asked = [GenerationRequest(r.token_ids, r.n, 12 + 4 * i) for i, r in enumerate(asked)]  # leave one by one
    assert_log_probs_are_the_policys(policy, asked, generated(policy, tokenizer, asked))


def test_a_model_that_would_not_be_handed_its_past_is_refused(tokenizer):
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8))
    with pytest.raises(ConfigurationError, match="MambaForCausalLM does not take: use VLLMEngine"):
        TransformersEngine().attach(recurrent, tokenizer)


def test_top_k_and_top_p_exclude_what_they_should():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(draw(logits, Sampling(top_k=2), generator)[0].tolist()) == {0, 1}
    assert set(draw(logits, Sampling(top_p=0.6), generator)[0].tolist()) == {0, 1}
    assert set(draw(logits, Sampling(top_p=0.49), generator)[0].tolist()) == {0}
    # Top-k leaves 0.5 and 0.3; the first is 0.625 of them. Top-p is a share of the rest, as in transformers and vLLM.
    assert set(draw(logits, Sampling(top_k=2, top_p=0.6), generator)[0].tolist()) == {0}
    shares = torch.bincount(draw(logits, Sampling(), generator)[0], minlength=4) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_k": 40}, {"top_p": 0.8}, {"temperature": 0.7}])
def test_min_p_leaves_the_tokens_that_transformers_leaves(settings):
    torch.manual_seed(1)
    logits = 3 * torch.randn(20, 100)
    sampling = Sampling(min_p=0.1, **settings)
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    for warper in [TopKLogitsWarper(40)] * ("top_k" in settings) + [TopPLogitsWarper(0.8)] * ("top_p" in settings):
        expected = warper(None, expected)
    expected = MinPLogitsWarper(0.1)(None, expected).softmax(-1)
    assert (expected > 0).sum(-1).unique().numel() > 3  # the number of tokens that stay is another for each row
    draws = 3000
    generator = torch.Generator().manual_seed(0)
    for row, shares in zip(logits, expected, strict=True):
        tokens, logprobs = draw(row.expand(draws, -1), sampling, generator)
        drawn = torch.bincount(tokens, minlength=100) / draws
        assert drawn[shares == 0].sum() == 0
        torch.testing.assert_close(drawn, shares, atol=0.04, rtol=0)  # over four standard deviations of a share
        policys = (row / sampling.temperature).log_softmax(-1)
        torch.testing.assert_close(logprobs, policys[tokens])  # the trainer's


def test_tokens_are_drawn_as_often_as_they_are_likely_however_large_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    likely, draws = [0, 70_000, 149_999], 3000
    logits = torch.full((1, 150_000), torch.log(torch.tensor(0.4 / 149_997)).item())
    logits[0, likely] = torch.tensor([0.3, 0.2, 0.1]).log()
    tokens = torch.cat([draw(logits.expand(100, -1), Sampling(), generator)[0] for _ in range(draws // 100)])
    shares = torch.stack([(tokens == token).float().mean() for token in likely])
    # Three standard deviations of a share of 0.3 in 3,000 draws are 0.025.
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.2, 0.1]), atol=0.025, rtol=0)
    others = tokens[~torch.isin(tokens, torch.tensor(likely))]
    assert len(others) / draws == pytest.approx(0.4, abs=0.027)
    assert len(others.unique()) > 0.99 * len(others)  # none of them more often than the rest
    impossible = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(1000, -1)
    assert set(draw(impossible, Sampling(), generator)[0].tolist()) == {1, 3}


def test_generation_leaves_the_policy_in_its_mode_and_without_gradients(engine, policy, tokenizer):
    policy.train()
    engine.generate(requests(tokenizer, budget=2), Sampling(), seed=0)
    assert policy.training
    assert all(p.grad is None for p in policy.parameters())


def test_misuse_is_told(policy, tokenizer, engine):
    with pytest.raises(EngineError, match="before it was attached"):
        TransformersEngine().generate([], Sampling(), seed=0)
    with pytest.raises(EngineError, match="WeightSyncCallback"):
        engine.require_version(1)
    with pytest.raises(ConfigurationError, match="suffix budget of 0"):
        GenerationRequest((1,), 1, 0)
    with pytest.raises(ConfigurationError, match="top_p"):
        Sampling(top_p=0)
    with pytest.raises(ConfigurationError, match=r"min_p=1\.5"):
        Sampling(min_p=1.5)
    with pytest.raises(ConfigurationError, match=r"repetition_penalty=1\.1 is refused: .* log-probs that no update"):
        Sampling(repetition_penalty=1.1)
