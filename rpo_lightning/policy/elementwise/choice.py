"""``model.elementwise_kernels``: which kernels compute norms, gated MLPs and rotary embeddings."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch

from rpo_lightning.core.errors import ConfigurationError, one_line, require_modules
from rpo_lightning.policy.elementwise.liger import LigerKernels, runs_kernels, supports
from rpo_lightning.policy.elementwise.trial import failure_of_kernels
from rpo_lightning.policy.weights import underlying_model

log = logging.getLogger(__name__)

ElementwiseKernels = Literal["auto", "liger", "none"]


def require_choice(kernels: str) -> None:
    """Check the setting.

    Raises:
        ConfigurationError: There are no such kernels, or Liger is named and not installed.
    """
    if kernels not in ("auto", "liger", "none"):
        raise ConfigurationError(f"model.elementwise_kernels must be one of auto, liger, none; got {kernels!r}")
    if kernels == "liger":
        require_modules("liger", "liger_kernel")


def use_elementwise_kernels(policy: Any, kernels: ElementwiseKernels, device: torch.device) -> None:
    """Put fused kernels into a policy, in place, and compare a layer of each kind with the plain one.

    Call this on the whole policy, before an adapter is put on and before it is copied or sharded.

    Args:
        policy: The loaded policy.
        kernels: ``liger``, ``none``, or ``auto``: Liger on a GPU if it is installed, knows the model and agrees with
            the plain layers.
        device: Where the policy will compute.

    Raises:
        ConfigurationError: ``liger`` is asked for and cannot be used.
    """
    if kernels == "none" or (kernels == "auto" and not runs_kernels(device)):
        return
    obstacle = _missing(policy, device) or _disagreement(policy, device)
    if obstacle is None:
        return
    if kernels == "liger":
        raise ConfigurationError(f"model.elementwise_kernels=liger: {obstacle}; set it to auto or none")
    log.warning(f"norms, gated MLPs and rotary embeddings are computed without fused kernels: {obstacle}")


def _missing(policy: Any, device: torch.device) -> str | None:
    """Why fused kernels cannot be tried; ``None`` if they can."""
    if not runs_kernels(device):
        return f"Liger's kernels need a GPU, and the policy is on {device.type!r}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'rpo-lightning[liger]')"
    if next(policy.parameters()).dtype == torch.float64:
        return "Liger's kernels compute in fp32, and the policy is in fp64"
    model = underlying_model(policy)
    return None if supports(model) else f"Liger has none for {type(model).__name__}"


def _disagreement(policy: Any, device: torch.device) -> str | None:
    """Patch a policy and try it; why it is not patched any more, or ``None`` if it is."""
    model = underlying_model(policy)
    try:
        patched = LigerKernels(model)
    except Exception as error:
        return f"Liger cannot patch {type(model).__name__} ({one_line(error)})"
    changed = patched.changed_modules()
    try:
        failure = failure_of_kernels(model, changed, device)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # the errors of Triton, of its compiler and of CUDA share no other class
        failure = f"a trial failed: {one_line(error)}"
    if failure is not None:
        patched.remove()
        return f"Liger's do not agree with the layers of {type(model).__name__} ({failure})"
    log.info(
        f"Liger's kernels compute {len(changed)} norms, gated MLPs and rotary embeddings of {type(model).__name__}"
    )
    return None
