"""Checks whether flash attention's kernels for sequences of any length are usable here and compute correctly.

``gpu.py`` calls them by names that are not public in torch. Other implementations can take over the same names
(``torch.nn.attention.activate_flash_attention_impl``, ``model.flash_attention``). Each is tried on a few tokens before
its first use and compared with masked attention, gradients included.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from rpo_lightning.core.errors import one_line
from rpo_lightning.policy.prefix_sharing.arrangement import Arrangement
from rpo_lightning.policy.prefix_sharing.gpu import PackedRows, packed_attention
from rpo_lightning.policy.prefix_sharing.rows import RowShape

log = logging.getLogger(__name__)

# Limits of the kernels.
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_OLDEST_CAPABILITY = (8, 0)
# The trial's rows, and the largest relative error of 16 bits against fp32. Correct kernels are off by about 0.01.
# Kernels work on tiles of up to 256 tokens: the last row has more than one.
_TRIAL = Arrangement.of(
    (RowShape(3, 2, (4, 7)), RowShape(0, 5, (6,)), RowShape(2, 1, (1, 3, 2)), RowShape(0, 300, (260, 4)))
)
_TRIAL_ERROR = 0.05


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels support such queries, keys and values and have passed their trial."""
    size = query.shape[-1]
    if value.shape[-1] != size:
        return False
    if not (query.is_cuda and torch.version.cuda) or query.dtype not in _DTYPES or size % 8 or size > _LARGEST_HEAD:
        return False
    if torch.cuda.get_device_capability(query.device) < _OLDEST_CAPABILITY:
        return False
    return kernels_agree(query.device, query.dtype, query.shape[1], key.shape[1], size, active_implementation())


def active_implementation() -> str:
    """Which implementation of flash attention torch calls in this process; ``FA2`` is torch's own."""
    return current_flash_attention_impl() or "FA2"


@lru_cache
def kernels_agree(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, implementation: str
) -> bool:
    """Whether the kernels agree with masked attention on a few tokens. Logs a warning if not.

    Args:
        device: A GPU.
        dtype: A dtype of 16 bits.
        heads: Query heads.
        key_heads: Heads of keys and values.
        size: Size of a head.
        implementation: The active implementation. A verdict is kept for each, so a change is tried anew.
    """
    problem = failure_of_kernels(device, dtype, heads, key_heads, size)
    if problem is not None:
        log.warning(
            f"flash attention ({implementation}) for sequences of any length does not work in torch "
            f"{torch.__version__} on {device}: {problem}; attention is computed row by row with a mask, which is "
            "slower and takes more memory"
        )
    return problem is None


def failure_of_kernels(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> str | None:
    """How the active kernels differ from masked attention on a few tokens; ``None`` if they agree."""

    def unchanged(tensor: Tensor) -> Tensor:
        return tensor

    try:
        # This runs within a model's forward pass. The trial must not depend on its autocast and default device, and
        # must not add to the tensors that a checkpointed layer saves.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged),
            torch.device("cpu"),
        ):
            error = _trial_error(device, dtype, heads, key_heads, size)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as failure:  # implementations raise assertions and the errors of their compilers too
        return f"a trial failed ({one_line(failure)})"
    return None if error < _TRIAL_ERROR else f"a trial is off by {error:.2g}"


def _trial_error(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> float:
    """Largest relative error of the output and of the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    computed, detached = _TRIAL.tokens, _TRIAL.detached

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, size, generator=generator).to(device, dtype)

    q, k, v = (draw(count, computed).requires_grad_() for count in (heads, key_heads, key_heads))
    before = (draw(key_heads, detached), draw(key_heads, detached))
    weights = draw(computed, heads)

    def outcome(output: Tensor) -> list[Tensor]:
        return [x.float() for x in (output, *torch.autograd.grad((output * weights).sum(), (q, k, v)))]

    expected = outcome(_masked_attention(q, k, v, before))
    found = outcome(packed_attention(q, k, v, PackedRows.of(_TRIAL, device), None, before))
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return torch.stack(errors).max().item()  # NaN if one of them is


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of the trial's rows in fp32 with a mask over everything, [1, tokens, heads, size]."""
    query = query.float()
    key, value = (torch.cat([x, own], dim=2).float() for x, own in zip(before, (key, value), strict=True))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    detached_tokens = before[0].shape[2]
    seen = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool)
    for i, shape in enumerate(_TRIAL.shapes):
        start, first = _TRIAL.context_starts[i], _TRIAL.suffix_starts[i]
        own_detached = slice(_TRIAL.detached_starts[i], _TRIAL.detached_starts[i] + shape.detached)
        context = slice(detached_tokens + start, detached_tokens + start + shape.context)
        suffixes = zip(accumulate(shape.suffixes, initial=first), shape.suffixes, strict=False)
        for begin, length in [(start, shape.context), *suffixes]:
            stop = begin + length
            seen[begin:stop, own_detached] = True
            if begin != start:
                seen[begin:stop, context] = True
            own = slice(detached_tokens + begin, detached_tokens + stop)
            seen[begin:stop, own] = torch.ones(length, length).tril().bool()
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    probs = scores.masked_fill(~seen.to(query.device), -torch.inf).softmax(-1)
    return (probs @ value).transpose(1, 2)
