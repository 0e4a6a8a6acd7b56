"""Other implementations of flash attention, through torch's own functions that replace its operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import restore_flash_attention_impl

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.prefix_sharing.flash_choice import use_flash_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import active_implementation
from rpo_lightning.rewards import UniformRandomReward
from tests.conftest import REASONER, make_data, make_module, make_trainer
from tests.runs.pretend_gpu import flash_packages
from tests.runs.pretend_gpu.claims_run import PretendStrategy
from tests.runs.pretend_gpu.claims_update import LAYERS, gradient_of, loss_of, model_of
from tests.runs.pretend_gpu.device import CUDA, moved

OTHERS = ["FA3", "FA4"]
# The trial: two calls.
TRIAL = {"forward": 2, "backward": 2}


@pytest.fixture
def packages(pretend_gpu, monkeypatch):
    yield flash_packages.install(monkeypatch)
    restore_flash_attention_impl(_raise_warn=False)


@pytest.fixture
def llama(pretend_gpu):
    return moved(model_of("llama"))


def gradient(model):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return gradient_of(model, loss_of(model))


@pytest.mark.parametrize("name", OTHERS)
def test_shared_rows_are_computed_by_the_implementation_that_is_chosen(packages, llama, name, caplog):
    """torch's functions for it take what shared rows send, forward and backward."""
    expected = gradient(llama)
    use_flash_attention(llama, name, CUDA)
    assert packages[name].calls == TRIAL
    loss = loss_of(llama)
    packages[name].calls.clear()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        gradient_of(llama, loss)
        packages[name].calls.clear()
        found = gradient_of(llama, loss)
    assert packages[name].calls == {"forward": 2 * LAYERS, "backward": 2 * LAYERS}
    assert torch.equal(found, expected)
    assert not caplog.records


@pytest.mark.parametrize("name", OTHERS)
def test_an_implementation_that_computes_something_else_is_not_used(packages, llama, name, caplog):
    expected = gradient(llama)
    packages[name].fault = 0.9
    use_flash_attention(llama, name, CUDA)
    assert packages[name].calls == TRIAL
    assert active_implementation() == "FA2"
    assert torch.equal(gradient(llama), expected)
    assert packages[name].calls == TRIAL
    (record,) = caplog.records
    assert record.message.startswith(f"{name} does not compute flash attention as shared rows need it")
    assert "off by 0.1" in record.message
    assert "FA2 is used instead" in record.message


def test_the_verdict_on_one_implementation_is_not_used_for_another(packages, llama, caplog):
    gradient(llama)  # FA2 passes
    use_flash_attention(llama, "FA3", CUDA)
    packages["FA3"].fault = 0.9  # and the trial for these rows finds it
    gradient(llama)
    assert "flash attention (FA3) for sequences of any length does not work" in caplog.text
    caplog.clear()
    use_flash_attention(llama, "FA4", CUDA)
    packages["FA4"].calls.clear()
    gradient(llama)
    assert packages["FA4"].calls["backward"] > 0
    use_flash_attention(llama, "FA2", CUDA)
    packages["FA4"].calls.clear()
    gradient(llama)
    assert not packages["FA4"].calls
    assert not caplog.records


def test_a_choice_is_activated_once_and_null_changes_nothing(packages, llama, monkeypatch):
    use_flash_attention(llama, "FA3", CUDA)
    monkeypatch.setattr(flash_packages.torch.ops, "flash_attn_3", None)
    use_flash_attention(llama, "FA3", CUDA)
    use_flash_attention(llama, None, CUDA)
    assert active_implementation() == "FA3"


def test_a_gpu_of_another_generation_is_refused_in_a_line(packages, llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ConfigurationError, match=r"=FA3: it needs compute capability 9.x, and cuda:0 has 8.0; set it"):
        use_flash_attention(llama, "FA3", CUDA)
    with pytest.raises(ConfigurationError, match=r"=FA4: it needs compute capability 9.x or 10.x, and cuda:0 has 8.0"):
        use_flash_attention(llama, "FA4", CUDA)
    use_flash_attention(llama, "FA2", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ConfigurationError, match=r"=FA2: it needs compute capability 8.0 or newer, and cuda:0 has 7.5"):
        use_flash_attention(llama, "FA2", CUDA)


def test_a_missing_package_is_refused_in_a_line(pretend_gpu, llama):
    with pytest.raises(ConfigurationError, match=r"=FA3: .*No module named 'flash_attn_interface'\); build it from .*"):
        use_flash_attention(llama, "FA3", CUDA)
    with pytest.raises(ConfigurationError, match=r"=FA4: .*No module named 'flash_attn'\); pip install .*, or set it"):
        use_flash_attention(llama, "FA4", CUDA)
    assert active_implementation() == "FA2"


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_updates_with_the_implementation_of_its_setting(packages, tokenizer, tmp_path, name):
    torch.manual_seed(0)
    policy = moved(load_policy(REASONER))
    module = make_module(
        policy=policy,
        tokenizer=tokenizer,
        rewards=[UniformRandomReward()],
        max_response_tokens=24,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        flash_attention=name,
    )
    trainer = make_trainer(
        tmp_path, max_steps=1, strategy=PretendStrategy(), accelerator="auto", precision="bf16-mixed"
    )
    trainer.fit(module, datamodule=make_data())
    assert active_implementation() == name
    assert packages[name].calls["backward"] > TRIAL["backward"]
