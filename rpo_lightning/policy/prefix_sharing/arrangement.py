"""Where the parts of concatenated rows lie: all contexts first, then rows without branches, then all suffixes.

In this order the contexts and the suffixes of a micro-batch are slices, so kernels need no index to pick them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rpo_lightning.policy.prefix_sharing.rows import RowShape


@dataclass(frozen=True)
class Arrangement:
    """Positions of rows that are concatenated. A row without branches stays in one piece.

    Attributes:
        shapes: The rows, in the order of the micro-batch.
        order: Indices of the rows as they are laid out: those with branches first.
        context_starts: Start of each row's context, in the order of ``shapes``.
        suffix_starts: Start of each row's first suffix, in the order of ``shapes``; the others follow it.
        detached_starts: Start of each row's detached tokens among those of all rows.
        contexts: End of the contexts of rows with branches.
        suffixes: Start of the suffixes of rows with branches.
        tokens: Number of computed tokens.
    """

    shapes: tuple[RowShape, ...]
    order: tuple[int, ...]
    context_starts: tuple[int, ...]
    suffix_starts: tuple[int, ...]
    detached_starts: tuple[int, ...]
    contexts: int
    suffixes: int
    tokens: int

    @classmethod
    def of(cls, shapes: Sequence[RowShape]) -> Arrangement:
        """Lay rows out."""
        order = sorted(range(len(shapes)), key=lambda i: not shapes[i].branches)
        context_starts, suffix_starts = [0] * len(shapes), [0] * len(shapes)
        position = contexts = 0
        for i in order:
            context_starts[i] = position
            suffix_starts[i] = position + shapes[i].context  # of a row without branches
            position += shapes[i].trunk
            contexts = position if shapes[i].branches else contexts
        suffixes = position
        for i in order:
            if shapes[i].branches:
                suffix_starts[i] = position
                position += sum(shapes[i].suffixes)
        detached = [0, *accumulate(shape.detached for shape in shapes)][:-1]
        return cls(
            tuple(shapes), tuple(order), tuple(context_starts), tuple(suffix_starts), tuple(detached), contexts,
            suffixes, position,
        )  # fmt: skip

    @property
    def detached(self) -> int:
        """Number of detached tokens of all rows."""
        return sum(shape.detached for shape in self.shapes)

    @property
    def branching(self) -> list[int]:
        """Indices of the rows with branches, as they are laid out."""
        return [i for i in self.order if self.shapes[i].branches]
