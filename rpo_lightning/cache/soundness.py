"""Checks of saved caches. A file or checkpoint may come from elsewhere or be damaged, so nothing in it is believed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpo_lightning.core.errors import CacheError, one_line

FORMAT_VERSION = 3
# Format 2 has one response for each question, and nothing shared by all of them.
READABLE_VERSIONS = (2, FORMAT_VERSION)
# Every slot has columns of its own, so a few rows of high slots could claim all memory.
MOST_SLOTS = 256


def require_same_origin(version: Any, tokenizer: Any, expected_tokenizer: str, where: str) -> None:
    """Check that a saved cache has a format that this release reads, and this policy's tokenizer.

    Args:
        version: Format version of what was saved.
        tokenizer: Its tokenizer fingerprint.
        expected_tokenizer: Fingerprint of the policy's tokenizer.
        where: What to call it in the message.

    Raises:
        CacheError: It has another format version or tokenizer.
    """
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise CacheError(f"{where}: cache format {version}, this release reads formats {known}: build a new cache")
    if tokenizer != expected_tokenizer:
        raise CacheError(
            f"{where}: made with another tokenizer (fingerprint {tokenizer}, this policy's is {expected_tokenizer}), "
            "so its token ids mean other text: build a new cache"
        )


def read_notes(text: str | bytes) -> dict[str, Any]:
    """A cut strategy's notes from their JSON text.

    Raises:
        ValueError: It is no JSON object, or holds a number that is not finite, or is nested too deeply.
    """
    try:
        notes = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(notes, dict):
        raise ValueError(f"an object is expected, it is a {type(notes).__name__}")
    return notes


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no finite number")


def response_problem(
    token_ids: np.ndarray,
    lengths: np.ndarray,
    rewards: np.ndarray,
    span_counts: np.ndarray,
    spans: np.ndarray,
    vocabulary_size: int | None = None,
) -> tuple[int, str] | None:
    """The first row whose response cannot be one, and what is wrong with it; ``None`` if all can.

    Args:
        token_ids: Token ids of all rows one after the other, [tokens].
        lengths: Tokens of each row, -1 for a row without a response, [rows].
        rewards: The reward of each row, [rows].
        span_counts: How many spans each row has, [rows].
        spans: All spans one after the other, ``(step, count)``, [spans, 2].
        vocabulary_size: Token ids lie below it; ``None`` to allow any.
    """
    ends = np.cumsum(np.maximum(lengths, 0))
    for wrong, text in (
        (token_ids < 0, "token id {} is negative"),
        (
            token_ids >= (vocabulary_size or np.inf),
            f"token id {{}} is outside the policy's vocabulary of {vocabulary_size}",
        ),
    ):
        if wrong.any():
            place = int(np.argmax(wrong))
            return int(np.searchsorted(ends, place, side="right")), text.format(token_ids[place])
    rows = np.repeat(np.arange(len(lengths)), span_counts)
    covered = np.bincount(rows, spans[:, 1], minlength=len(lengths))
    backwards = np.bincount(rows, (spans[:, 1] < 1) | (spans[:, 0] < -1), minlength=len(lengths))
    for wrong, text in (
        (lengths == 0, "its response has no token"),
        (~np.isfinite(rewards), "its reward is not a finite number"),
        (backwards > 0, "a span has fewer than 1 token, or a step below -1"),
        (covered != np.maximum(lengths, 0), "its spans do not add up to the tokens of its response"),
    ):
        if wrong.any():
            return int(np.argmax(wrong)), text
    return None


def array_of(tensor: Any, kind: type[np.generic], shape: tuple[int | None, ...]) -> np.ndarray:
    """A tensor of a checkpoint as an array, without a copy.

    Args:
        tensor: What the checkpoint holds.
        kind: The type that its numbers must have.
        shape: The shape that it must have; ``None`` for any length.

    Raises:
        ValueError: It is something else. An expanded tensor is too, since it may claim any size.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a tensor is expected, it is a {type(tensor).__name__}")
    expected = torch.from_numpy(np.zeros(0, kind)).dtype
    fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != expected or not fits or not tensor.is_contiguous():
        raise ValueError(f"a tensor of {expected} is expected, it is {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor.numpy()


@contextmanager
def reading_state() -> Iterator[None]:
    """Turn what goes wrong with the parts of a checkpoint's cache into a line.

    Raises:
        CacheError: A part is missing or cannot be one.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise CacheError(f"the checkpoint's cache is damaged ({missing}): resume from another checkpoint") from error


def is_number(value: Any, low: float, high: float = sys.float_info.max) -> bool:
    """Whether a value of a strategy's notes is a number from ``low`` to ``high``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
