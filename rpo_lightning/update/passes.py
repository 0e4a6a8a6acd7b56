"""The forward and backward passes of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rpo_lightning.policy.prefix_sharing.held_context import HeldContext
from rpo_lightning.policy.prefix_sharing.rows import SharedRow, micro_batches


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        rows: The rows that it computes; none in the last pass of a held context, which computes the context's gradient.
        context: What its only row continues; ``None`` if its rows have their contexts in them.
        of_reference: The same for the reference policy.
        opens: Whether it is the first pass that continues its context.
    """

    rows: list[SharedRow]
    context: HeldContext | None = None
    of_reference: HeldContext | None = None
    opens: bool = False

    @property
    def closes(self) -> bool:
        """Whether the pass computes the gradient of a held context."""
        return not self.rows

    @property
    def tokens(self) -> int:
        """Number of tokens of a pass with rows. Passes that continue a context compute its last token each."""
        if self.context is None:
            return sum(len(row) for row in self.rows)
        suffixes = sum(len(member.suffix_ids) for row in self.rows for member in row.members)
        return suffixes + 1 + (len(self.context.ids) if self.opens else 0)


def passes_of(
    rows: Sequence[SharedRow], max_tokens: int, longest_shared: int | None, gradient: bool, has_reference: bool = False
) -> list[Pass]:
    """Arrange rows in passes: first those that continue contexts, then micro-batches.

    Args:
        rows: The rows.
        max_tokens: Most tokens of a micro-batch.
        longest_shared: See ``RowCost``.
        gradient: Whether gradients go through contexts.
        has_reference: Whether a reference policy computes the same rows.
    """
    parts: dict[int, list[SharedRow]] = {}
    for row in rows:
        if row.continues:
            parts.setdefault(row.members[0].group, []).append(row)
    passes = []
    for of_group in parts.values():
        context = HeldContext(of_group[0].context_ids, gradient)
        of_reference = HeldContext(of_group[0].context_ids, gradient=False) if has_reference else None
        passes += [Pass([row], context, of_reference, opens=i == 0) for i, row in enumerate(of_group)]
        if gradient:
            passes.append(Pass([], context))
    whole = [row for row in rows if not row.continues]
    return passes + [Pass(batch) for batch in micro_batches(whole, max_tokens, longest_shared)]
