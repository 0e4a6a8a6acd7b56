"""What a GPU's memory holds between phases: the order around a sync, gradients, casts. Shown without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpo_lightning.policy.lora import LoRA
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.rollout import GenerationRequest, Sampling, TransformersEngine, VLLMEngine
from tests.conftest import make_data, make_module, make_trainer


class RecordedVLLM:
    """Notes what it is told, and reads the weights it is given."""

    def __init__(self, calls):
        self.calls = calls

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags=None):
        self.calls.append(f"wake {' '.join(tags or ['all'])}")

    def collective_rpc(self, method, args=(), kwargs=None):
        if callable(method):
            return []
        self.calls.append(str(method))
        if kwargs:
            assert [name for name, _ in kwargs["weights_iterator"]]

    @property
    def llm_engine(self):
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
        return SimpleNamespace(vllm_config=config, list_loras=set, add_lora=lambda _: self.calls.append("add adapter"))

    def reset_prefix_cache(self):
        self.calls.append("reset prefix cache")
        return True


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("empty torch's cache"))
    return found


def engine_asleep(calls, policy, level, sync="merged"):
    engine = VLLMEngine(sleep_level=level, sync=sync)
    engine._transfer._holds_base_of = policy
    engine._llm, engine._used_sleep_level, engine._weights_version = RecordedVLLM(calls), level, 0
    engine._policy = policy
    engine.sleep()
    return engine


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0"])
def test_torchs_cache_is_emptied_before_each_part_of_the_engine_wakes(policy, calls, version, monkeypatch):
    monkeypatch.setattr("rpo_lightning.rollout.vllm.platform._version", lambda: tuple(map(int, version.split(".")[:2])))
    monkeypatch.setattr("rpo_lightning.rollout.vllm.platform.on_cpu", lambda: False)
    engine = engine_asleep(calls, policy, level=2)
    engine.load_weights(policy, 1)
    assert calls == [
        "sleep 2", "empty torch's cache", "wake weights", "reload_weights", "empty torch's cache", "wake kv_cache",
        "reset prefix cache",
    ]  # fmt: skip


def test_torchs_cache_is_emptied_before_an_engine_wakes_with_the_weights_it_has(policy, calls):
    engine = engine_asleep(calls, policy, level=1)
    engine.wake()
    assert calls == ["sleep 1", "empty torch's cache", "wake all"]


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_is_given_adapters_gets_the_base_again_only_if_its_sleep_dropped_it(policy, calls, level):
    policy = LoRA(rank=2).apply(policy)
    engine = engine_asleep(calls, policy, level, sync="adapter")
    engine.load_weights(policy, 1)
    assert calls == [
        f"sleep {level}", "empty torch's cache", "wake weights", *(["reload_weights"] if level == 2 else []),
        "add adapter", "empty torch's cache", "wake kv_cache", "reset prefix cache",
    ]  # fmt: skip


def test_level_2_is_the_default_on_a_gpu_if_a_sync_gives_all_weights_and_level_1_if_not(monkeypatch):
    monkeypatch.setattr("rpo_lightning.rollout.vllm.platform.on_cpu", lambda: False)
    monkeypatch.setattr("rpo_lightning.rollout.vllm.platform.earlier_engine_holds_memory", lambda: False)
    assert VLLMEngine()._supported_sleep_level() == 2
    assert VLLMEngine(sync="adapter")._supported_sleep_level() == 1
    assert VLLMEngine(sleep_level=1)._supported_sleep_level() == 1
    assert VLLMEngine(sleep_level=2, sync="adapter")._supported_sleep_level() == 2


def test_no_gradient_lives_through_a_rollout(tmp_path):
    module = make_module(rewards=[UniformRandomReward()], max_response_tokens=8, minibatches_per_pass=2)
    roll_out, held = module.roll_out, []

    def noted(*args, **kwargs):
        held.append(sum(p.grad is not None for p in module.policy.parameters()))
        return roll_out(*args, **kwargs)

    module.roll_out = noted
    make_trainer(tmp_path, max_steps=6).fit(module, datamodule=make_data())
    assert held == [0, 0, 0]
    assert all(p.grad is None for p in module.policy.parameters())


class CountCasts(TorchDispatchMode):
    """Counts casts of whole weight matrices to 16 bits."""

    def __init__(self, policy):
        super().__init__()
        self.shapes = {p.shape for p in policy.parameters() if p.dim() == 2}
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.casts += args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


def test_a_rollout_under_autocast_casts_each_weight_once_however_many_steps_it_has(policy, tokenizer):
    engine = TransformersEngine()
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, 0)
    request = GenerationRequest(tuple(tokenizer("49a-1b*9=")["input_ids"]), 2, 1)
    counted = []
    for steps in (4, 16):
        asked = [GenerationRequest(request.token_ids, 2, steps)]
        # As Lightning's precision plugin enters it.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), CountCasts(policy) as counter:
            engine.generate(asked, Sampling(), seed=0)
            assert not torch.is_autocast_cache_enabled()
        counted.append(counter.casts)
    matrices = sum(p.dim() == 2 for p in policy.parameters())
    assert 0 < counted[0] == counted[1] <= 2 * matrices  # the trial of decoding may add a pass


def test_the_update_after_a_rollout_sees_no_weight_that_was_cast_before(policy, tokenizer):
    engine = TransformersEngine()
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, 0)
    ids = torch.tensor([tokenizer("49a-1b*9=")["input_ids"]])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        engine.generate([GenerationRequest(tuple(ids[0].tolist()), 2, 4)], Sampling(), seed=0)
        policy(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
