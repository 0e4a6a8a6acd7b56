"""``model.flash_attention``: which implementation of flash attention computes on a GPU.

torch has FA2 built in. Other packages can take over its operators, for the whole process. The operators are those of
plain attention (SDPA) and those of shared rows (``gpu.py``), forward and backward.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from rpo_lightning.core.errors import ConfigurationError, one_line
from rpo_lightning.policy.limits import head_size
from rpo_lightning.policy.prefix_sharing.gpu_check import active_implementation, failure_of_kernels

log = logging.getLogger(__name__)

FlashAttention = Literal["FA2", "FA3", "FA4"]

# Major compute capabilities, as in torch's _fa3.py and _fa4.py, and where the packages come from.
_CAPABILITIES = {"FA2": range(8, 100), "FA3": range(9, 10), "FA4": range(9, 11)}
_SOURCES = {
    "FA3": "build it from the folder hopper of https://github.com/Dao-AILab/flash-attention",
    "FA4": "pip install --pre flash-attn-4",
}


def require_flash_attention(choice: str | None) -> None:
    """Check the setting.

    Raises:
        ConfigurationError: There is no such implementation.
    """
    if choice is not None and choice not in _CAPABILITIES:
        raise ConfigurationError(f"model.flash_attention must be null or one of FA2, FA3, FA4; got {choice!r}")


def use_flash_attention(policy: Any, choice: FlashAttention | None, device: torch.device) -> None:
    """Activate an implementation in this process, and try it with the policy's heads. FA2 remains if the trial fails.

    Call this before the policy is tried or trained.

    Args:
        policy: The loaded policy.
        choice: The implementation; ``None`` changes nothing.
        device: Where the policy will compute.

    Raises:
        ConfigurationError: The implementation is not for this device, or is not installed.
    """
    if choice is None:
        return
    activate(choice, device)
    heads = _heads(policy)
    if choice == "FA2" or heads is None:
        return
    failure = failure_of_kernels(device, torch.bfloat16, *heads)
    if failure is None:
        log.info(f"{choice} computes flash attention on {device}")
        return
    restore_flash_attention_impl()
    log.warning(
        f"{choice} does not compute flash attention as shared rows need it, in torch {torch.__version__} on {device}: "
        f"{failure}; FA2 is used instead (model.flash_attention)"
    )


def activate(choice: FlashAttention, device: torch.device) -> None:
    """Make torch call an implementation in this process, untried.

    Args:
        choice: The implementation.
        device: Where it will compute.

    Raises:
        ConfigurationError: It is not for this device, or is not installed.
    """
    obstacle = _misfit(choice, device)
    if obstacle is not None:
        raise ConfigurationError(f"model.flash_attention={choice}: {obstacle}")
    if choice == active_implementation():
        return
    if choice == "FA2":
        restore_flash_attention_impl()
        return
    try:
        activate_flash_attention_impl(choice)
    except Exception as error:  # of an import: a missing package, a library of another CUDA, kernels that are missing
        raise ConfigurationError(
            f"model.flash_attention={choice}: it cannot be loaded ({one_line(error)}); {_SOURCES[choice]}, or set it "
            "to null"
        ) from error


def _misfit(choice: FlashAttention, device: torch.device) -> str | None:
    """Why the implementation is not for this device; ``None`` if it is."""
    if device.type != "cuda" or not torch.version.cuda:
        return f"it needs an NVIDIA GPU, and the policy is on {device.type!r}; set it to null"
    capability = torch.cuda.get_device_capability(device)
    majors = _CAPABILITIES[choice]
    if capability[0] in majors:
        return None
    needed = " or ".join(f"{major}.x" for major in majors) if len(majors) < 3 else "8.0 or newer"
    return f"it needs compute capability {needed}, and {device} has {'.'.join(map(str, capability))}; set it to null"


def _heads(policy: Any) -> tuple[int, int, int] | None:
    """Query heads, heads of keys and values, and their size; ``None`` if the configuration names none."""
    config = policy.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_size(config)
