"""Runs Liger's kernels in Triton's interpreter, on a CPU. Import this before Liger; it needs ``TRITON_INTERPRET=1``.

Liger 0.8 does what the interpreter of Triton 3.9 cannot: it calls a method of numbers that it passes to a kernel, and
functions of CUDA's library (1/sqrt, tanh). Nor does the interpreter compute in bf16: the trial's 16 bits are fp16 here.
"""

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from rpo_lightning.policy.elementwise import trial

_convert = interpreter._implicit_cvt


def _convert_numbers_too(argument):
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.core.tensor(handle, tl.float32)
    return _convert(argument)


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


interpreter._implicit_cvt = _convert_numbers_too
liger_kernel.ops.rms_norm.rsqrt = _rsqrt
liger_kernel.ops.geglu.tanh = _tanh
trial._COARSE = torch.float16
