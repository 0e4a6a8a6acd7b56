"""Spans: at which update the tokens of a response were generated.

A span ``(step, count)`` stands for ``count`` tokens in a row that were generated at update ``step``. A response has a
tuple of them, in the order of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from rpo_lightning.core.types import Spans


def extend_spans(prefix_spans: Spans, suffix_length: int, step: int) -> Spans:
    """Spans of a prefix followed by ``suffix_length`` tokens generated at ``step``."""
    spans = list(prefix_spans)
    if suffix_length:
        if spans and spans[-1][0] == step:
            spans[-1] = (step, spans[-1][1] + suffix_length)
        else:
            spans.append((step, suffix_length))
    return tuple(spans)


def cut_spans(spans: Spans, length: int) -> Spans:
    """Spans of the first ``length`` tokens."""
    result = []
    for step, count in spans:
        if length <= 0:
            break
        result.append((step, min(count, length)))
        length -= count
    return tuple(result)


def newest_step(spans: Spans) -> int:
    """The update at which the last tokens were generated; 0 without tokens."""
    return spans[-1][0] if spans else 0


def initial_tokens(spans: Spans) -> int:
    """Number of tokens from before the first update, imported ones included."""
    return sum(count for step, count in spans if step <= 0)


def flat_spans(many: Sequence[Spans]) -> tuple[np.ndarray, np.ndarray]:
    """Spans of many responses as two arrays.

    Returns:
        The number of spans of each response, [responses], and all spans one after the other, [spans, 2].
    """
    counts = np.fromiter(map(len, many), np.int64, len(many))
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(many)), np.int64, 2 * int(counts.sum()))
    return counts, runs.reshape(-1, 2)


def nested_spans(counts: np.ndarray, runs: np.ndarray) -> list[Spans]:
    """The inverse of ``flat_spans``."""
    left = iter(runs.tolist())
    return [tuple((step, count) for step, count in (next(left) for _ in range(n))) for n in counts.tolist()]
