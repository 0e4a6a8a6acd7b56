"""Lets a CPU build of torch run autograd on tensors that say they are on "cuda". For a process of its own.

A CPU build has no device guard for CUDA, and the autograd engine asks for one. torch has a guard that does nothing, for
its fake tensors; this installs it, and answers "yes" where the engine asks whether there is CUDA. It reaches into the
libraries by their symbols, with ctypes only: a build without them, or with real CUDA, is left alone.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_HOOKS = "_ZN2at6detail12getCUDAHooksEv"
_CUDA = 1  # c10::DeviceType::CUDA
# Slots of AcceleratorHooksInterface that are made to answer "yes"; hasCUDA is the first of CUDAHooksInterface.
_IS_BUILT, _HAS_PRIMARY_CONTEXT = 2, 4
_SLOTS = 130
# Whatever C code points to must not be collected.
_kept: list[object] = []


def obstacle() -> str | None:
    """Why this build of torch cannot pretend; ``None`` if it can."""
    if torch.version.cuda or torch.version.hip:
        return "this build of torch has a GPU of its own"
    folder = Path(torch.__file__).parent
    header = folder / "include/ATen/detail/AcceleratorHooksInterface.h"
    libraries = [folder / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    if not all(path.exists() for path in (header, *libraries)):
        return "this build of torch is laid out in another way"
    symbols = [(libraries[0], _GUARDS), (libraries[1], _HOOKS)]
    if not all(hasattr(ctypes.CDLL(str(path)), symbol) for path, symbol in symbols):
        return "this build of torch has other symbols"
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return "this build of torch has no guard that does nothing"
    return None


def install() -> None:
    """Install the guard in this process."""
    folder = Path(torch.__file__).parent
    c10, cpu = (ctypes.CDLL(str(folder / "lib" / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * 32).in_dll(c10, _GUARDS)
    if guards[_CUDA]:
        return
    # torch replaces a guard that knows no devices by its own that does nothing.
    nothing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda _: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(nothing, ctypes.c_void_p).value] * 64)
    empty = ctypes.c_void_p(ctypes.addressof(methods))
    guards[_CUDA] = ctypes.addressof(empty)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[_CUDA] != ctypes.addressof(empty)

    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    get = getattr(cpu, _HOOKS)
    get.restype = ctypes.c_void_p
    hooks = ctypes.cast(get(), ctypes.POINTER(ctypes.c_void_p))
    header = (folder / "include/ATen/detail/AcceleratorHooksInterface.h").read_text()
    has_cuda = len(re.findall(r"^\s*virtual ", header, re.MULTILINE)) + 1  # the destructor takes two slots
    old = ctypes.cast(hooks[0] - 16, ctypes.POINTER(ctypes.c_void_p))
    new = (ctypes.c_void_p * _SLOTS)(*[old[i] for i in range(_SLOTS)])
    for slot in (_IS_BUILT, _HAS_PRIMARY_CONTEXT, has_cuda):
        new[2 + slot] = ctypes.cast(yes, ctypes.c_void_p).value
    _kept.extend([c10, cpu, nothing, methods, empty, yes, new])
    hooks[0] = ctypes.addressof(new) + 16
    torch._C._set_only_lift_cpu_tensors(True)
