"""A whole iteration of ``Trainer.fit`` on the pretend GPU, with the transformers engine."""

from __future__ import annotations

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from rpo_lightning.policy.load import load_policy
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.rollout.transformers import sampling
from tests.conftest import REASONER, make_data, make_module, make_trainer
from tests.runs.pretend_gpu.device import CUDA, moved


class PretendAccelerator(Accelerator):
    """Lightning's view of the pretend GPU."""

    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [CUDA]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "cuda"


class PretendStrategy(SingleDeviceStrategy):
    """One pretend GPU. The policy stays there: what pretends cannot be moved by Lightning."""

    def __init__(self):
        super().__init__(device=CUDA, accelerator=PretendAccelerator())

    def model_to_device(self):
        pass

    def teardown(self):
        pass


def trained(folder, policy, tokenizer, **settings):
    torch.manual_seed(0)
    module = make_module(
        policy=policy,
        tokenizer=tokenizer,
        rewards=[UniformRandomReward()],
        max_response_tokens=24,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # Adam would blow rounding up
    )
    trainer = make_trainer(folder, max_steps=1, **settings)
    trainer.fit(module, datamodule=make_data())
    return module


def test_an_iteration_ends_with_the_weights_of_the_cpu(pretend_gpu, tokenizer, tmp_path, monkeypatch):
    # A GPU draws tokens in another way than a CPU.
    monkeypatch.setattr(sampling, "_pick", lambda probs, source: torch.multinomial(probs, 1, generator=source)[:, 0])
    on_cpu = trained(tmp_path / "cpu", load_policy(REASONER), tokenizer)
    pretend_gpu.clear()
    there = trained(
        tmp_path / "gpu", moved(load_policy(REASONER)), tokenizer, strategy=PretendStrategy(), accelerator="auto"
    )
    assert pretend_gpu.kernels.total() > 1000
    sampled = [[c.token_ids for c in group.completions] for group in there.groups]
    assert sampled == [[c.token_ids for c in group.completions] for group in on_cpu.groups]
    for expected, found in zip(on_cpu.policy.parameters(), there.policy.parameters(), strict=True):
        torch.testing.assert_close(found.detach().inner, expected.detach(), atol=2e-5, rtol=0)


def test_an_iteration_in_mixed_precision_samples_and_updates_with_the_gpus_kernels(pretend_gpu, tokenizer, tmp_path):
    policy = load_policy(REASONER)
    before = [p.detach().clone() for p in policy.parameters()]
    trained(tmp_path, moved(policy), tokenizer, strategy=PretendStrategy(), accelerator="auto", precision="bf16-mixed")
    assert pretend_gpu.kernels["_flash_attention_backward.default"] > 0
    assert not any(torch.equal(p.detach().inner, old) for p, old in zip(policy.parameters(), before, strict=True))
