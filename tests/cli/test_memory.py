"""The estimate of memory: exact where it can be, close where it says so, and the same sums by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rpo_lightning.cli.main import main
from rpo_lightning.cli.memory.activations import activation_parts, around_layers_bytes, saved_by_head_bytes
from rpo_lightning.cli.memory.estimate import estimate
from rpo_lightning.cli.memory.model import ModelShape, model_shape, shape_of
from rpo_lightning.cli.memory.optimizers import optimizer_state
from rpo_lightning.cli.memory.plan import EnginePlan, Plan, Precision, Sharding
from rpo_lightning.cli.memory.remedies import remedies
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.prefix_sharing.compatibility import row_cost
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow
from tests.conftest import REASONER

GIB = 2**30
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
PLAIN = [SharedRow((Row(i, 0, tuple(range(1, 119)), tuple(range(1, 12)), 11),)) for i in range(4)]
CONTEXT = tuple(i % 250 + 1 for i in range(399))
SHARED = [SharedRow(tuple(Row(0, i, CONTEXT, tuple(range(1, 30)), 29) for i in range(6)))]
# A model of round numbers, for sums by hand.
ROUND = ModelShape("Round", 1000, 0, 0, 0, 10, 80, 200, 100, 50, 8, 8, 4, 2, 1, 16)


def small(family: str = "llama", dtype: torch.dtype = torch.float32, checkpointing: bool = False):
    torch.manual_seed(0)
    model_class, config_class, more = FAMILIES[family]
    model = model_class(config_class(**SIZES, **more)).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def saved_bytes(model, batch, mixed: bool) -> int:
    """Bytes of what autograd saves in a forward pass, parameters left out, every storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    # As Lightning's MixedPrecision does it.
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(model, batch, 1.0, 0, torch.device("cpu"))
    return sum(storage.nbytes() for storage in storages.values())


def estimated_saved(shape: ModelShape, plan: Plan, tokens: int, scored: int, on_gpu: bool = False) -> float:
    plan = replace(plan, micro_batch_tokens=tokens, prompt_tokens=1, response_tokens=1, on_gpu=on_gpu)
    kept = next(part for part in activation_parts(shape, plan) if part.name == "activations kept")
    return kept.backward + saved_by_head_bytes(shape, plan, scored)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [Precision.FULL, Precision.MIXED, Precision.HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_within_a_fiftieth_of_what_autograd_saves(family, precision, checkpointing):
    model = small(family, torch.bfloat16 if precision is Precision.HALF else torch.float32, checkpointing)
    saved = saved_bytes(model, PLAIN, precision is Precision.MIXED)
    plan = Plan(precision=precision, checkpointing=checkpointing, shares_prefixes=False)
    expected = estimated_saved(shape_of(model), plan, tokens=4 * 129, scored=4 * 11)
    # With checkpointing little is left here, and rotary embeddings, which stacked rows share, are counted for each.
    assert expected == pytest.approx(saved, rel=0.1 if checkpointing else 0.02)


@pytest.mark.parametrize("precision", [Precision.FULL, Precision.MIXED, Precision.HALF])
def test_activations_of_shared_rows_are_within_a_tenth_of_what_autograd_saves(precision):
    model = small(dtype=torch.bfloat16 if precision is Precision.HALF else torch.float32)
    row_cost(model, shares=True, full_logits=False)
    saved = saved_bytes(model, SHARED, precision is Precision.MIXED)
    expected = estimated_saved(shape_of(model), Plan(precision=precision), tokens=len(SHARED[0]), scored=6 * 29)
    assert expected == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("precision", [Precision.MIXED, Precision.HALF])
def test_activations_of_rows_packed_for_a_gpu_are_within_a_twentieth_of_what_autograd_saves(precision, packed):
    model = small(dtype=torch.bfloat16 if precision is Precision.HALF else torch.float32)
    row_cost(model, shares=True, full_logits=False)
    packed.clear()
    saved = saved_bytes(model, SHARED, precision is Precision.MIXED)
    assert packed
    expected = estimated_saved(shape_of(model), Plan(precision=precision), len(SHARED[0]), scored=6 * 29, on_gpu=True)
    assert expected == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("precision", [Precision.FULL, Precision.MIXED, Precision.HALF])
def test_activations_of_an_adapter_are_within_a_twentieth_of_what_autograd_saves(precision):
    model = small(dtype=torch.bfloat16 if precision is Precision.HALF else torch.float32)
    shape = shape_of(small(), LoRA(rank=8))
    adapted = LoRA(rank=8).apply(model)
    saved = saved_bytes(adapted, PLAIN, precision is Precision.MIXED)
    plan = Plan(precision=precision, shares_prefixes=False)
    assert estimated_saved(shape, plan, tokens=4 * 129, scored=4 * 11) == pytest.approx(saved, rel=0.05)


def test_parameters_are_counted_without_loading_them():
    loaded, shape = load_policy(REASONER), model_shape(REASONER)
    assert shape.trainable == sum(p.numel() for p in loaded.parameters())  # tied ones once
    assert (shape.layers, shape.frozen, shape.quantized) == (3, 0, 0)
    assert shape.layers * shape.layer_parameters + shape.root_parameters == shape.trainable


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 8, "target_modules": ["q_proj", "v_proj"]}])
def test_an_adapters_parameters_are_counted_without_loading_anything(settings):
    adapted, shape = LoRA(**settings).apply(load_policy(REASONER)), model_shape(REASONER, LoRA(**settings))
    assert shape.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.frozen == sum(p.numel() for p in adapted.parameters() if not p.requires_grad)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_are_counted_as_bitsandbytes_holds_them(quantization):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from rpo_lightning.cli.memory.states import quantized_bytes

    adapter = LoRA(quantization=quantization)
    loaded = load_policy(REASONER, **adapter.loading_options())
    held = sum(_held_bytes(p) for p in loaded.parameters() if type(p).__name__ in ("Params4bit", "Int8Params"))
    # The tables of bitsandbytes' code books are the rest.
    assert quantized_bytes(model_shape(REASONER, adapter), quantization) == pytest.approx(held, rel=0.02)


def _held_bytes(parameter) -> int:
    held = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        nested = getattr(state, "state2", None)
        return held + state.absmax.nbytes + (nested.absmax.nbytes if nested is not None else 0)
    scales = getattr(parameter, "SCB", None)
    return held + (0 if scales is None else scales.nbytes)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("torch.optim.AdamW", {}),
        ("torch.optim.AdamW", {"amsgrad": True}),
        ("torch.optim.SGD", {}),
        ("torch.optim.SGD", {"momentum": 0.9}),
        ("torch.optim.RMSprop", {"momentum": 0.9, "centered": True}),
        ("torch.optim.Adagrad", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_states_are_exactly_those_that_an_update_makes(path, arguments, dtype):
    model = small(dtype=dtype)
    optimizer = getattr(torch.optim, path.rpartition(".")[2])(model.parameters(), lr=1e-3, **arguments)
    token_logprobs(model, PLAIN, 1.0, 0, torch.device("cpu")).logprobs_BS.sum().backward()
    optimizer.step()
    made = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step" and v is not None)
    count = sum(p.numel() for p in model.parameters())
    assert count * optimizer_state(path, arguments).bytes_per_parameter(dtype.itemsize) == made
    assert sum(p.grad.nbytes for p in model.parameters()) == count * dtype.itemsize


def test_an_8_bit_optimizer_keeps_two_bytes_a_parameter_and_scales():
    assert optimizer_state("bitsandbytes.optim.AdamW8bit").bytes_per_parameter(4) == 2 * (1 + 4 / 256)
    assert optimizer_state("bitsandbytes.optim.PagedAdamW8bit").eight_bit


def test_only_a_fused_step_makes_no_temporaries_and_an_unknown_class_is_taken_to_be_adamw():
    assert optimizer_state("torch.optim.AdamW").temporaries == 1
    assert optimizer_state("torch.optim.AdamW", {"fused": True}).temporaries == 0
    unknown = optimizer_state("my.Muon")
    assert (unknown.tensors, unknown.is_known) == (2, False)


def part(found, name: str):
    return next(p for p in found.parts if p.name == name)


@pytest.mark.parametrize(
    ("sharding", "precision", "weights", "gradients", "states"),
    [
        (Sharding.DDP, Precision.FULL, 4000, 4000, 8000),
        (Sharding.DDP, Precision.MIXED, 4000, 4000, 8000),
        (Sharding.DDP, Precision.HALF, 2000, 2000, 4000),
        (Sharding.ZERO1, Precision.MIXED, 2000, 2000, 2000),
        (Sharding.ZERO2, Precision.MIXED, 2000, 500, 2000),
        (Sharding.ZERO3, Precision.MIXED, 500, 500, 2000),
    ],
)
def test_states_of_1000_parameters_on_4_ranks(sharding, precision, weights, gradients, states):
    found = estimate(ROUND, Plan(devices=2, nodes=2, sharding=sharding, precision=precision))
    assert part(found, "weights that train").step == weights
    assert part(found, "gradients").backward == gradients
    assert part(found, "optimizer states").rollout == states
    if sharding is Sharding.DDP:
        assert part(found, "DDP's buckets").rollout == gradients
    else:
        assert part(found, "fp32 master weights").rollout == 1000


def test_fsdp2_holds_whole_gradients_until_the_last_pass_unless_they_are_accumulated_sharded():
    plan = Plan(devices=4, sharding=Sharding.FSDP2, precision=Precision.MIXED)
    whole = part(estimate(ROUND, plan), "gradients (whole until the last pass)")
    assert (whole.rollout, whole.backward, whole.step) == (0, 4000, 1000)
    sharded = part(estimate(ROUND, replace(plan, accumulate_sharded=True)), "gradients")
    assert (sharded.rollout, sharded.backward, sharded.step) == (0, 1000, 1000)
    # Root unit in bf16; three layers in bf16; two layers' gradients in fp32.
    assert part(estimate(ROUND, plan), "gathered from other ranks").backward == 200 * 2 + 80 * (3 * 2 + 2 * 4)


def test_offloading_moves_master_weights_gradients_and_states_to_the_cpu():
    plan = Plan(devices=4, sharding=Sharding.ZERO2, precision=Precision.MIXED, offloads_optimizer=True)
    found = estimate(ROUND, plan)
    assert {"fp32 master weights", "optimizer states", "gradients"}.isdisjoint(p.name for p in found.parts)
    assert dict(found.host)["master weights, gradients and optimizer states"] == 250 * (4 + 4 + 8)


def test_a_reference_is_a_second_policy_unless_there_is_an_adapter():
    plan = Plan(devices=4, sharding=Sharding.DDP, precision=Precision.MIXED, has_reference=True)
    assert part(estimate(ROUND, plan), "reference policy").rollout == 4000
    assert part(estimate(ROUND, replace(plan, sharding=Sharding.FSDP2)), "reference policy").rollout == 1000
    assert part(estimate(ROUND, replace(plan, sharding=Sharding.ZERO3)), "reference policy").rollout == 2000
    adapted = replace(ROUND, trainable=100, frozen=900, adapter_ranks=8, adapter_inputs=8)
    assert all(p.name != "reference policy" for p in estimate(adapted, plan).parts)


def test_vllm_takes_its_share_while_it_is_awake_and_keeps_nothing_but_graphs_asleep():
    plan = Plan(engine=EnginePlan(is_vllm=True, gpu_share=0.4))
    asleep = part(estimate(ROUND, plan, device_bytes=80 * GIB), "vLLM, asleep in the update")
    assert (asleep.rollout, asleep.backward) == (32 * GIB, GIB)
    awake = estimate(ROUND, replace(plan, engine=replace(plan.engine, sleep_level=0)), device_bytes=80 * GIB)
    assert part(awake, "vLLM, awake throughout").backward == 32 * GIB
    # Without the GPU's size: what is beside vLLM in the rollout may be 60 % of it.
    open_end = estimate(ROUND, replace(plan, checkpointing=True))
    assert open_end.smallest_device == max(open_end.total("rollout") / 0.6, open_end.total("backward"))


def test_an_engine_that_is_given_adapters_keeps_its_weights_in_the_cpus_memory_asleep(capsys):
    config = str(Path(__file__).parents[2] / "configs" / "dapo_rpo_lora.yaml")
    arguments = ["memory", "--config", config, "--model.policy", REASONER, "--gpu_memory_gib", "80"]
    main(arguments)
    assert "vLLM's weights while it sleeps" not in capsys.readouterr().out
    main([*arguments, "--model.engine.sync", "adapter"])
    assert "vLLM's weights while it sleeps" in capsys.readouterr().out


def test_a_share_that_does_not_hold_the_engines_weights_does_not_fit():
    shape = replace(ROUND, trainable=10**9)
    plan = Plan(precision=Precision.HALF, engine=EnginePlan(is_vllm=True, gpu_share=0.1), prompt_tokens=40)
    plan = replace(plan, response_tokens=60, checkpointing=True, optimizer=optimizer_state("torch.optim.SGD"))
    needed = 10**9 * 2 + 10 * 2 * 4 * 2 * 100  # weights; keys and values of 10 layers and 100 tokens
    found = estimate(shape, plan, device_bytes=16 * 10**9)
    assert found.peak < 16 * 10**9
    assert not found.fits
    assert found.engine_lacks == pytest.approx(needed - 1.6 * 10**9)
    assert estimate(shape, replace(plan, engine=EnginePlan(is_vllm=True, gpu_share=0.2)), device_bytes=16 * 10**9).fits


def test_the_logits_of_a_chunk_do_not_grow_with_the_rows():
    shape = replace(ROUND, vocabulary=2**16)
    sizes = []
    for tokens in (2**14, 2**15):
        plan = Plan(micro_batch_tokens=tokens, prompt_tokens=1, response_tokens=1)
        sizes.append(part(estimate(shape, plan), "output head, a chunk of logits").backward)
    assert sizes[1] - sizes[0] == 2**14 * 8 * 4  # hidden states alone
    assert sizes[0] - 2**14 * 8 * 4 == 2**26 * (4 + 4 + 4)  # logits, log-probs and probabilities in fp32


def test_a_row_longer_than_the_limit_makes_the_largest_micro_batch():
    assert Plan(micro_batch_tokens=1024, prompt_tokens=512, response_tokens=4096).tokens == 4608


def test_remedies_lower_the_peak_and_name_their_settings():
    shape = replace(ROUND, trainable=10**9, layers=32, hidden=2048, query=2048, key=512, intermediate=8192)
    plan = Plan(devices=8, sharding=Sharding.DDP, precision=Precision.MIXED, engine=EnginePlan(is_vllm=True))
    found = estimate(shape, plan, device_bytes=24 * GIB)
    assert not found.fits
    tried = remedies(found)
    assert tried[0][0] == "model.update.gradient_checkpointing: true"
    assert all(other.peak < found.peak for _, other in tried)


def test_what_is_around_the_layers_is_counted_once():
    # 8 bytes of the id; cosine and sine of heads of 4 numbers; the norm's input, what it makes, and its scale.
    assert around_layers_bytes(ROUND, Plan(), tokens=1) == 8 + 2 * 4 * 4 + 8 * (4 + 4) + 4
