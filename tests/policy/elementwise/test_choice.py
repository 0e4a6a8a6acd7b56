"""When fused kernels are used, and what is said when they are not; with a stand-in for Liger's package."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.elementwise.choice import use_elementwise_kernels
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.weights import require_plain_names
from rpo_lightning.update.objectives import GRPO
from tests.conftest import REASONER, make_data, make_module, make_trainer

CPU = torch.device("cpu")


class StandIn(torch.nn.Module):
    """A norm that computes as transformers' does, up to rounding; ``calls`` and ``fault`` belong to all of them."""

    calls = 0
    fault = 1.0

    def forward(self, hidden):
        StandIn.calls += 1
        exact = hidden.double()
        exact = exact * (exact.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.weight * exact.to(hidden.dtype)) * StandIn.fault


rotations: list[torch.Tensor] = []


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    rotations.append(q)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def patch_llama(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    assert not cross_entropy
    assert not fused_linear_cross_entropy
    assert rope
    modeling_llama.apply_rotary_pos_emb = rotate
    modeling_llama.LlamaRMSNorm = StandIn
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__dict__["forward"] = StandIn.forward.__get__(module)


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger, and a device on which its kernels run."""
    package, transformers, patching = (
        ModuleType("liger_kernel" + name) for name in ("", ".transformers", ".transformers.monkey_patch")
    )
    for module in (package, transformers, patching):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    transformers._apply_liger_kernel_to_instance = patch_llama
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch_llama}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(StandIn, "calls", 0)
    monkeypatch.setattr(StandIn, "fault", 1.0)
    rotations.clear()
    return patching


def has_kernels(policy):
    return any("forward" in module.__dict__ for module in policy.modules())


def logprobs(policy):
    return policy(input_ids=torch.arange(3, 15)[None], use_cache=False).logits.log_softmax(-1)


def test_auto_uses_kernels_that_agree_and_says_so(liger, caplog):
    plain, policy = load_policy(REASONER), load_policy(REASONER)
    with caplog.at_level(logging.INFO):
        use_elementwise_kernels(policy, "auto", CPU)
    assert "Liger's kernels compute 10 norms" in caplog.text  # two a layer, the last, and three rotations
    StandIn.calls = 0
    rotations.clear()
    assert torch.allclose(logprobs(policy), logprobs(plain), atol=1e-4)
    assert (StandIn.calls, len(rotations)) == (7, 3)
    require_plain_names(policy)


def test_kernels_are_in_one_policy_only(liger):
    names = dict(vars(modeling_llama))
    use_elementwise_kernels(load_policy(REASONER), "auto", CPU)
    assert dict(vars(modeling_llama)) == names
    assert not has_kernels(load_policy(REASONER))


def test_kernels_that_disagree_are_taken_out_with_a_warning(liger, caplog):
    StandIn.fault = 1.01
    policy = load_policy(REASONER)
    use_elementwise_kernels(policy, "auto", CPU)
    assert not has_kernels(policy)
    assert "without fused kernels: Liger's do not agree with the layers of LlamaForCausalLM (its output" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(ConfigurationError, match=r"elementwise_kernels=liger: Liger's do not agree .* auto or none"):
        use_elementwise_kernels(policy, "liger", CPU)


def test_kernels_that_fail_are_taken_out_with_a_warning(liger, monkeypatch, caplog):
    def fail(self, hidden):
        raise OSError("no compiler\nand more")

    monkeypatch.setattr(StandIn, "forward", fail)
    policy = load_policy(REASONER)
    use_elementwise_kernels(policy, "auto", CPU)
    assert not has_kernels(policy)
    assert "(a trial failed: no compiler and more)" in caplog.text


def test_a_patch_that_stops_half_way_leaves_nothing_behind(liger, monkeypatch, caplog):
    def stop(model, **switches):
        patch_llama(model=model, **switches)
        raise KeyError("layer 3")

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", stop)
    names, policy = dict(vars(modeling_llama)), load_policy(REASONER)
    use_elementwise_kernels(policy, "auto", CPU)
    assert not has_kernels(policy)
    assert dict(vars(modeling_llama)) == names
    assert "Liger cannot patch LlamaForCausalLM ('layer 3')" in caplog.text


def test_models_without_kernels_and_fp64_are_told(liger, exact_policy):
    with pytest.raises(ConfigurationError, match="compute in fp32, and the policy is in fp64"):
        use_elementwise_kernels(exact_policy, "liger", CPU)
    with pytest.raises(ConfigurationError, match="Liger has none for Starcoder2ForCausalLM"):
        use_elementwise_kernels(exact_policy.float(), "liger", CPU)


def test_layers_with_kernels_compute_as_before_where_kernels_do_not_run(liger, monkeypatch):
    plain, policy = load_policy(REASONER), load_policy(REASONER)
    use_elementwise_kernels(policy, "auto", CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert torch.equal(logprobs(policy), logprobs(plain))


def test_nothing_happens_on_a_cpu(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    policy = load_policy(REASONER)
    use_elementwise_kernels(policy, "auto", CPU)
    assert not has_kernels(policy)
    assert not caplog.records
    with pytest.raises(ConfigurationError, match="need a GPU, and the policy is on 'cpu'"):
        use_elementwise_kernels(policy, "liger", CPU)


def test_the_setting_is_checked_before_anything_is_loaded(monkeypatch):
    with pytest.raises(
        ConfigurationError, match=r"model.elementwise_kernels must be one of auto, liger, none; got 'x'"
    ):
        make_module(elementwise_kernels="x")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigurationError, match=r"liger_kernel is not installed: pip install .*\[liger\]"):
        make_module(elementwise_kernels="liger")


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_a_run_uses_the_kernels_in_rollout_update_and_reference(liger, tmp_path, kernels):
    module = make_module(elementwise_kernels=kernels, objective=GRPO(beta=0.1), gradient_checkpointing=True)
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data())
    assert has_kernels(module.policy) == (kernels == "auto")
    assert bool(StandIn.calls) == (kernels == "auto")
    (reference,) = module._loss.reference.own_models
    assert has_kernels(reference) == (kernels == "auto")
    assert module.record.phase_tokens["reference_logprobs"] > 0
