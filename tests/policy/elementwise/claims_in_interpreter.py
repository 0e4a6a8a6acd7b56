"""What Liger's own kernels compute, in Triton's interpreter. ``test_liger.py`` runs this file in its own process."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
import triton
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import tests.policy.elementwise.triton_interpreter  # noqa: F401
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.policy.elementwise.choice import use_elementwise_kernels
from rpo_lightning.policy.elementwise.liger import LigerKernels
from rpo_lightning.policy.elementwise.trial import failure_of_kernels
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.parallel.fsdp2 import shard
from rpo_lightning.policy.weights import checkpoint_weights, require_plain_names
from rpo_lightning.update.reference import reference_of
from tests.conftest import make_data, make_module, make_trainer, passes_with_gradient

assert triton.knobs.runtime.interpret, "run tests/policy/elementwise/test_liger.py"
CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "gemma2", "gemma3_text", "olmo2", "granite"]
PER_LAYER = {"qwen3": 4 + 2, "gemma2": 5 + 1, "gemma3_text": 6 + 2}  # two norms, the MLP and the rotation elsewhere


def tiny(family="qwen2"):
    """Two layers of a family, with weights away from their initial ones and zeros."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=48, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def computed(model):
    """Log-probs of every token and the gradients of a weighted sum of them."""
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"log-probs": logprobs.detach(), **gradients}


def assert_same(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_a_patched_model_computes_the_same_log_probs_and_gradients(family):
    model = tiny(family)
    plain = computed(model)
    patched = LigerKernels(model)
    assert len(patched.changed_modules()) == 2 * PER_LAYER.get(family, 4) + 1
    fused = computed(model)
    assert_same(fused, plain)
    assert any(not torch.equal(fused[name], plain[name]) for name in plain)  # it is another computation
    patched.remove()
    assert all(torch.equal(value, plain[name]) for name, value in computed(model).items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma2", "olmo2"])
def test_the_trial_passes(family):
    model = tiny(family)
    assert failure_of_kernels(model, LigerKernels(model).changed_modules(), CPU) is None


def test_other_models_and_the_names_of_weights_stay_as_they_are(family):
    model = tiny(family)
    names, library = list(model.state_dict()), sys.modules[type(model).__module__]
    before = {
        name: (value, dict(vars(value)) if isinstance(value, type) else None) for name, value in vars(library).items()
    }
    LigerKernels(model)
    after = {
        name: (value, dict(vars(value)) if isinstance(value, type) else None) for name, value in vars(library).items()
    }
    assert after == before
    assert not any("forward" in module.__dict__ for module in tiny(family).modules())
    assert list(model.state_dict()) == names
    require_plain_names(model)


def norm_adds_to_its_weight(layer):
    layer.post_attention_layernorm.offset = 0.01


def mlp_gates_with_the_wrong_half(layer):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    layer.mlp.forward = forward.__get__(layer.mlp)


def rotation_turns_the_other_way(layer):
    names = layer.self_attn.forward.__func__.__globals__
    rotate = names["apply_rotary_pos_emb"]
    names["apply_rotary_pos_emb"] = lambda q, k, cos, sin: rotate(q, k, cos, -sin)


def norm_loses_the_gradient_of_its_input(layer):
    fused = layer.input_layernorm.forward.__func__

    def forward(self, x):
        return fused(self, x.detach())

    layer.input_layernorm.forward = forward.__get__(layer.input_layernorm)


@pytest.mark.parametrize(
    "fault",
    [
        norm_adds_to_its_weight,
        mlp_gates_with_the_wrong_half,
        rotation_turns_the_other_way,
        norm_loses_the_gradient_of_its_input,
    ],
)
def test_the_trial_notices_a_wrong_kernel(fault):
    model = tiny()
    patched = LigerKernels(model)
    for layer in model.model.layers:
        fault(layer)
    failure = failure_of_kernels(model, patched.changed_modules(), CPU)
    assert failure is not None
    assert re.search("differs by .* in fp32", failure)


def test_the_trial_notices_a_kernel_that_writes_into_a_gradient_which_is_still_needed():
    model = tiny("olmo2")  # its norms come before the residual sum, which needs their gradient too
    patched = LigerKernels(model)
    for layer in model.model.layers:
        layer.post_attention_layernorm.in_place = True
    assert "gradient" in (failure_of_kernels(model, patched.changed_modules(), CPU) or "")


def test_an_adapter_and_checkpointing_work_on_top():
    plain, fused = tiny(), tiny()
    use_elementwise_kernels(fused, "liger", CPU)
    results = []
    for model in (plain, fused):
        torch.manual_seed(3)
        policy = LoRA(rank=4, options={"init_lora_weights": False}).apply(model).train()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
        passes = passes_with_gradient(policy.get_base_model())
        results.append((computed(policy), dict(checkpoint_weights(policy))))
        assert passes == [0, 1, 1, 0]
    assert_same(results[1][0], results[0][0])
    assert results[1][1].keys() == results[0][1].keys()
    assert all(torch.equal(weight, results[0][1][name]) for name, weight in results[1][1].items())


def test_sharded_policies_keep_their_kernels(tmp_path):
    plain, fused = tiny(), tiny()
    expected = computed(plain)
    use_elementwise_kernels(fused, "liger", CPU)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        shard(fused, init_device_mesh("cpu", (1,)), "32-true")
        found = computed(fused)
        assert_same({name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}, expected)
    finally:
        torch.distributed.destroy_process_group()
    assert fused.model.layers[0].input_layernorm.forward.__self__ is fused.model.layers[0].input_layernorm


def test_a_reference_is_a_copy_with_weights_of_its_own():
    model = tiny()
    use_elementwise_kernels(model, "liger", CPU)
    before = computed(model)["log-probs"]
    reference = reference_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with reference() as copied, torch.no_grad():
        ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
        found = copied(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        assert copied.model.norm.forward.__self__ is copied.model.norm
    assert torch.allclose(found, before, atol=1e-6)


def test_a_run_trains_as_without_kernels(tmp_path):
    ends = []
    for kernels in ("none", "liger"):
        module = make_module(elementwise_kernels=kernels, group_size=2, max_response_tokens=6)
        trainer = make_trainer(tmp_path / kernels, max_steps=1)
        trainer.fit(module, datamodule=make_data(train=ArithmeticChain(size=2, operations=3), batch_size=1))
        assert ("forward" in module.policy.model.norm.__dict__) == (kernels == "liger")
        ends.append((module.groups[0].completions, copy.deepcopy(module.policy.state_dict())))
    assert [c.token_ids for c in ends[0][0]] == [c.token_ids for c in ends[1][0]]
    assert all(torch.allclose(ends[1][1][name], weight, atol=1e-6) for name, weight in ends[0][1].items())
