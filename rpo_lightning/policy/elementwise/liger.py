"""Puts Liger's kernels into one loaded model, and takes them out again.

Liger (arXiv 2410.10989, linkedin/Liger-Kernel) has fused kernels for norms, gated MLPs and rotary embeddings, and knows
for each of its models which variant is right. Its cross-entropy kernels are left out (``policy/output_head.py``).

Liger patches more than the model that it is given: it also replaces the classes and functions in the model's module of
transformers. Models made later, such as those that name the weights for an export, would be other ones. So the module
is put back as it was. That would lose the rotary embedding, which is a function of that module and belongs to no model;
instead, the attention layers of this model get a ``forward`` that finds Liger's function under the same name.

Only methods of instances change: parameters, buffers and their names stay. An adapter may be put on afterwards. Off the
GPU a patched layer computes as before.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_SWITCHES = ("rope", "rms_norm", "swiglu", "geglu")


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: a GPU, or any device in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def supports(model: Any) -> bool:
    """Whether Liger has kernels for the layers of this model."""
    return bool(_switches(model))


class LigerKernels:
    """Liger's kernels in one model.

    Args:
        model: A transformers causal language model, without an adapter. It is patched.
    """

    def __init__(self, model: Any) -> None:
        self._before = {module: dict(module.__dict__) for module in model.modules()}
        try:
            replaced = _liger_replaces(model, _switches(model))
            for module in self.changed_modules():
                _compute_elsewhere_as_before(module)
            for module in model.modules():
                _rotate_with(module, replaced)
        except BaseException:
            self.remove()
            raise

    def changed_modules(self) -> list[nn.Module]:
        """Modules that compute in another way than their class."""
        return [m for m, before in self._before.items() if m.__dict__.get("forward") is not before.get("forward")]

    def remove(self) -> None:
        """Make the model what it was. Call this before anything else changes it."""
        for module, before in self._before.items():
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)


def _switches(model: Any) -> dict[str, bool]:
    """Arguments of Liger's function for this model; empty if it has none of the kernels that are used here."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    parameters = inspect.signature(patch).parameters if patch is not None else {}
    flags = {name: name in _SWITCHES for name, p in parameters.items() if isinstance(p.default, bool)}
    return flags if any(flags.values()) else {}


def _liger_replaces(model: Any, switches: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Let Liger patch a model; undo what it replaces in transformers' modules, and return that by module and name."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before = {module: dict(vars(module)) for module in modules}
    replaced: dict[str, dict[str, Any]] = {}
    try:
        _apply_liger_kernel_to_instance(model=model, **switches)
    finally:
        for module, names in before.items():
            for name, value in names.items():
                if vars(module)[name] is not value:
                    replaced.setdefault(module.__name__, {})[name] = vars(module)[name]
                    setattr(module, name, value)
    return replaced


def _compute_elsewhere_as_before(module: nn.Module) -> None:
    """Let a patched module use its class's ``forward`` where Triton's kernels do not run."""
    fused = module.__dict__["forward"].__func__

    def forward(self: nn.Module, hidden: torch.Tensor, *others: Any, **options: Any) -> Any:
        compute = fused if runs_kernels(hidden.device) else type(self).forward
        return compute(self, hidden, *others, **options)

    module.__dict__["forward"] = MethodType(forward, module)


def _rotate_with(module: nn.Module, replaced: dict[str, dict[str, Any]]) -> None:
    """Let an attention layer call Liger's function where its class calls one that Liger replaces."""
    plain = type(module).forward
    if not isinstance(plain, FunctionType) or "forward" in module.__dict__:
        return
    functions = {
        name: _rotation(fused, plain.__globals__[name])
        for name, fused in replaced.get(plain.__module__, {}).items()
        if name in plain.__code__.co_names and not isinstance(plain.__globals__.get(name), type)
    }
    if functions:
        names = {**plain.__globals__, **functions}
        forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        forward.__kwdefaults__ = plain.__kwdefaults__
        module.__dict__["forward"] = MethodType(forward, module)


def _rotation(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(query: torch.Tensor, *others: Any, **options: Any) -> Any:
        return (fused if runs_kernels(query.device) else plain)(query, *others, **options)

    return rotate
