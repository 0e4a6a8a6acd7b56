"""What a GPU must offer: packages, bf16, the kernels of shared rows. The first part of ``make test-gpu``; seconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import torch
from packaging.requirements import Requirement
from torch.nn.functional import scaled_dot_product_attention

from rpo_lightning.policy.elementwise.choice import use_elementwise_kernels
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.prefix_sharing.gpu_check import failure_of_kernels
from rpo_lightning.rollout.transformers.attention import attended_by_products
from tests.conftest import REASONER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("package", ["torch", "transformers", "lightning", "vllm", "liger-kernel", "peft", "deepspeed"])
def test_a_package_is_of_a_version_that_is_supported(package):
    required = [Requirement(line) for line in requires("rpo-lightning") or ()]
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert all(r.specifier.contains(installed, prereleases=True) for r in required if r.name == package)


def test_the_gpu_multiplies_in_bf16():
    assert torch.cuda.get_device_capability() >= (8, 0), "older GPUs have neither bf16 nor flash attention"
    left, right = (torch.randn(512, 512, device="cuda") for _ in range(2))
    exact = left.double() @ right.double()
    assert ((left.bfloat16() @ right.bfloat16()).double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (12, 2, 128), (3, 3, 32)])
@pytest.mark.parametrize("implementation", ["FA2", "FA3", "FA4"], indirect=True)
def test_torchs_kernels_pass_the_trial(implementation, dtype, heads, key_heads, size):
    with torch.device("cuda"):
        assert failure_of_kernels(torch.device("cuda", 0), dtype, heads, key_heads, size) is None


def test_scores_are_not_rounded_to_16_bits_before_their_softmax():
    """Keys with a large mean: all scores are large, and their small differences decide."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 64, generator=generator) for n in (4, 200, 200))
    query, key, value = (x.bfloat16() for x in (query + 3, key + 3, value))
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    output, _ = attended_by_products(query.cuda(), key.cuda(), value.cuda(), None)
    rounded = scaled_dot_product_attention(query.cuda(), key.cuda(), value.cuda())
    assert (output.cpu() - exact).norm() < 2 * (rounded.cpu() - exact).norm()


def test_ligers_kernels_pass_the_trial():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel (extra: liger)")
    policy = load_policy(REASONER).cuda()
    use_elementwise_kernels(policy, "liger", torch.device("cuda", 0))  # an error says where they disagree
    assert "forward" in policy.model.norm.__dict__
