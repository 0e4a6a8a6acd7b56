"""A pretend GPU: tensors that say they are on "cuda" and compute on the CPU.

They refuse to meet tensors of the CPU, as a GPU's do. Kernels and synchronisations are counted, each with the line that
caused it. Flash attention's operators for sequences of any length are written out in ``flash.py``. What registers
kernels of its own for a GPU can replace operators.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.runs.pretend_gpu import flash

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).parents[3] / "rpo_lightning")
# Operators that move no data.
_VIEWS = (
    "view", "expand", "slice", "select", "transpose", "permute", "t.default", "unsqueeze", "squeeze", "detach", "alias",
    "split", "as_strided", "unbind", "_unsafe_view", "chunk", "empty", "lift", "unfold", "_reshape_alias", "diagonal",
)  # fmt: skip
_READ_BY_HOST = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.unique_dim.default,
}  # fmt: skip
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Counts:
    """What a pretend GPU was asked to do.

    Attributes:
        kernels: Calls by operator.
        to_host: Synchronisations in which the host waits for the GPU, by the lines that cause them.
        to_device: Copies from the host, by the lines that cause them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.to_device: Counter[str] = Counter()


COUNTS = Counts()
# Kernels that were registered in place of an operator's own.
REPLACED: dict[str, Callable[..., Any]] = {}


class PretendLibrary:
    """Stands in for ``torch.library.Library``, which a build for the CPU cannot call: holds kernels for the GPU."""

    def __init__(self, *_):
        pass

    def impl(self, name, kernel, _):
        REPLACED[name if "." in name else f"{name}.default"] = kernel

    def __del__(self):
        REPLACED.clear()


def _lines() -> str:
    own = [f for f in traceback.extract_stack() if PACKAGE in f.filename]
    return " < ".join(f"{f.filename.removeprefix(PACKAGE)}:{f.lineno}" for f in reversed(own[-3:]))


class PretendTensor(torch.Tensor):
    """A tensor on the pretend GPU; ``inner`` is where it is computed."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        assert inner.device.type == "cpu"
        assert not isinstance(inner, PretendTensor)
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"PretendTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        COUNTS.to_host[f"tolist {_lines()}"] += 1
        return self.inner.tolist()


class PretendGPU(TorchDispatchMode):
    """Within it, what is made on "cuda" or sent there is on the pretend GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _tensors_in(value) -> list[torch.Tensor]:
    """Tensors in arguments, however they are nested; torch's own function for trees takes ten times as long."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for part in value for x in _tensors_in(part)]


def _with_tensors(value, change):
    """Arguments or a result with ``change`` made to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _with_tensors(part, change) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)([_with_tensors(part, change) for part in value])
    return value


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_by_mask(func, args) -> bool:
    return func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])


def _count(func, name, args, pretended, leaves_gpu) -> None:
    if func in _COPIES and leaves_gpu:
        COUNTS.to_host[f"copy {_lines()}"] += 1
    elif func in _COPIES and len(pretended) < (1 if func is aten._to_copy.default else 2):
        COUNTS.to_device[f"copy {_lines()}"] += 1
    elif func in _READ_BY_HOST or (pretended and _is_by_mask(func, args)):
        COUNTS.to_host[f"{name} {_lines()}"] += 1
    if not name.startswith(_VIEWS):
        COUNTS.kernels[name] += 1


def _refuse_meeting(func, name, args, from_cpu) -> None:
    """What has no dimensions may come from the CPU, as on a GPU; so may an index, which is copied."""
    met = [x for x in from_cpu if x.dim() > 0]
    if not met or func in _COPIES:
        return
    if func in _INDEXING and isinstance(args[0], PretendTensor):
        COUNTS.to_device[f"index {_lines()}"] += 1
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device: {name} got cuda, and cpu of {[tuple(x.shape) for x in met]}"
    )


def _run(func, args, kwargs):
    tensors = _tensors_in((args, kwargs))
    pretended = [x for x in tensors if isinstance(x, PretendTensor)]
    device = kwargs.get("device")
    if not pretended and not _is_cuda(device):
        return func(*args, **kwargs)
    name = str(func).removeprefix("aten.")
    to_cpu = device is not None and not _is_cuda(device)
    leaves_gpu = to_cpu or (func is aten.copy_.default and not isinstance(args[0], PretendTensor))
    _refuse_meeting(func, name, args, [x for x in tensors if not isinstance(x, PretendTensor)])
    _count(func, name, args, pretended, leaves_gpu)
    if name in REPLACED:
        with PretendGPU():
            return REPLACED[name](*args, **kwargs)
    result = _computed(func, args, kwargs, to_cpu or not pretended)
    if to_cpu:
        return result
    result = _with_tensors(result, PretendTensor)
    return return_and_correct_aliasing(func, args, kwargs, result) if pretended else result


def _computed(func, args, kwargs, moves):
    on_cpu = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    args, on_cpu = _with_tensors((args, on_cpu), lambda x: x.inner if isinstance(x, PretendTensor) else x)
    if func is aten._flash_attention_forward.default:
        return flash.forward(*args, **on_cpu)
    if func is aten._flash_attention_backward.default:
        return flash.backward(*args, **on_cpu)
    if func is aten.bmm.dtype:
        return torch.bmm(args[0].float(), args[1].float()).to(args[2])
    result = func(*args, **on_cpu)
    if moves and func is aten._to_copy.default and result.data_ptr() == args[0].data_ptr():
        return result.clone()
    return result


def moved(model):
    """A model whose parameters and buffers are on the pretend GPU."""
    seen: dict[int, torch.Tensor] = {}

    def there(x):
        return seen.setdefault(id(x), PretendTensor(x.detach().clone()))

    parameters: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = parameters.setdefault(
                    id(p), torch.nn.Parameter(there(p), requires_grad=p.requires_grad)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor):
                setattr(module, name, there(value))
    return model
