"""Arranges responses in rows and rows in micro-batches; a row computes the context of a group once.

A ``SharedRow`` is one row of a forward pass: a context, then the suffixes of several members of a group. With one
member it is a plain row. Every suffix sees the context and itself only. Each member's log-probs and gradients are
therefore those of a plain row, to rounding. The context stays on the autograd graph and gets the sum of the members'
gradients.

A group that is longer than a micro-batch is spread over several rows. They continue a context that is computed once
(``held_context.py``), or each repeats it. Gradients add up, and the result is the same. Where sharing costs more than
it saves (a short context, long suffixes), every member gets a plain row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rpo_lightning.core.types import Group

LossScope = Literal["suffix", "response"]


@dataclass(frozen=True)
class Row:
    """One response as token ids.

    Attributes:
        group: Index of its group in the batch.
        member: Index of the member within the group.
        context_ids: Prompt and prefix, the same for all members of a group.
        suffix_ids: The tokens that this member sampled.
        scope_length: Number of tokens in the loss scope, counted from the end.
    """

    group: int
    member: int
    context_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    scope_length: int

    def __len__(self) -> int:
        return len(self.context_ids) + len(self.suffix_ids)


@dataclass(frozen=True)
class SharedRow:
    """Responses of one group that are computed in one row.

    Attributes:
        members: The responses.
        continues: Whether the context is computed once for this and other rows of the group, in passes of their own.
    """

    members: tuple[Row, ...]
    continues: bool = False

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Prompt and prefix."""
        return self.members[0].context_ids

    @property
    def branches(self) -> bool:
        """Whether the row has several members."""
        return len(self.members) > 1

    def shape(self, detached: int = 0) -> RowShape:
        """Lengths of its parts, if the first ``detached`` tokens of the context are not computed."""
        return RowShape(detached, len(self.context_ids) - detached, tuple(len(row.suffix_ids) for row in self.members))

    def __len__(self) -> int:
        return len(self.context_ids) + sum(len(row.suffix_ids) for row in self.members)


@dataclass(frozen=True)
class RowShape:
    """Lengths of the parts of a row, in tokens.

    Attributes:
        detached: First part of the context; its keys and values come from an earlier pass.
        context: The rest of the context.
        suffixes: Length of each suffix.
    """

    detached: int
    context: int
    suffixes: tuple[int, ...]

    @property
    def branches(self) -> bool:
        """Whether the row has several suffixes."""
        return len(self.suffixes) > 1

    @property
    def trunk(self) -> int:
        """Number of tokens that attend causally from the row's start: its context, or all of it without branches."""
        return self.context if self.branches else len(self)

    def __len__(self) -> int:
        """Number of tokens that are computed."""
        return self.context + sum(self.suffixes)


@dataclass(frozen=True)
class RowCost:
    """Cost of computing a row. The unit is the matrix products of one token.

    Attributes:
        attention: Cost of a query–key pair; 0 ignores attention.
        branch: Extra cost of a suffix token in a row of several members, for gathering and merging it.
        shares: Whether members may share a row.
        longest_shared: Longest sequence (context and one suffix) that may be in a shared row; ``None`` for any. Shared
            rows do not support windows and chunks, and some rotary embeddings change for longer sequences.
        context: Cost of a context token: 1, or a third without gradient through the context.
        holds: Whether the rows of a group may continue a context that is computed once.
    """

    attention: float = 0.0
    branch: float = 0.0
    shares: bool = True
    longest_shared: int | None = None
    context: float = 1.0
    holds: bool = False

    def of(self, rows: Sequence[SharedRow]) -> float:
        """Cost of the rows of a group."""
        contexts = 1 if rows[0].continues else len(rows)
        return contexts * self._of_context(len(rows[0].context_ids)) + sum(self._of_suffixes(row) for row in rows)

    def _of_context(self, length: int) -> float:
        return self.context * (length + self.attention * length**2 / 2)

    def _of_suffixes(self, row: SharedRow) -> float:
        """Attention pads the suffixes of a row to the longest of them."""
        context, longest = len(row.context_ids), max(len(member.suffix_ids) for member in row.members)
        pairs = len(row.members) * (longest * context + longest**2 / 2)
        return (len(row) - context) * (1.0 + (self.branch if row.branches else 0.0)) + self.attention * pairs


def rows_of(groups: Sequence[Group], scope: LossScope) -> list[Row]:
    """One row a response, for all members of all groups; none for a response without a token in the scope."""
    rows = []
    for index, group in enumerate(groups):
        context = group.request.prompt.token_ids + group.request.prefix_ids
        for member, completion in enumerate(group.completions):
            in_scope = len(completion.token_ids) + (len(group.request.prefix_ids) if scope == "response" else 0)
            if in_scope:
                rows.append(Row(index, member, context, completion.token_ids, in_scope))
    return rows


def shared_rows(rows: Sequence[Row], max_tokens: int, cost: RowCost) -> list[SharedRow]:
    """Let members of a group share rows if that is cheaper.

    Args:
        rows: The responses.
        max_tokens: Most tokens of a shared row.
        cost: Cost of a row.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [shared for members in groups.values() for shared in _cheapest(members, max_tokens, cost)]


def micro_batches(
    rows: Sequence[SharedRow], max_tokens: int, longest_shared: int | None = None
) -> list[list[SharedRow]]:
    """Split rows into the fewest micro-batches of at most ``max_tokens`` tokens, and make these similar in size.

    A row that is longer gets a micro-batch of its own. Long rows come first: memory then peaks early in a run.

    Args:
        rows: The rows to compute, none of which continues a context.
        max_tokens: Most tokens of a micro-batch, padding included.
        longest_shared: See ``RowCost``. Longer rows and shorter ones are never in the same micro-batch: all its
            rows would be computed without a window, or with the rotary embedding of the longest row.
    """
    ordered = sorted(rows, key=lambda r: (-len(r), r.members[0].group, r.members[0].member))
    beyond: list[SharedRow] = []
    within: list[SharedRow] = []
    for row in ordered:
        is_beyond = longest_shared is not None and not row.branches and len(row) > longest_shared
        (beyond if is_beyond else within).append(row)
    return [batch for kind in (beyond, within) if kind for batch in _even(kind, max_tokens)]


def _even(ordered: Sequence[SharedRow], max_tokens: int) -> list[list[SharedRow]]:
    batches = _fill(ordered, max_tokens)
    low, high = 1, max_tokens
    while low < high:  # the smallest limit with that many micro-batches makes them even
        middle = (low + high) // 2
        if len(_fill(ordered, middle)) <= len(batches):
            high = middle
        else:
            low = middle + 1
    return _fill(ordered, high)


def _cheapest(members: Sequence[Row], max_tokens: int, cost: RowCost) -> list[SharedRow]:
    alone = [SharedRow((row,)) for row in members]
    longest = max(len(row) for row in members)
    if not cost.shares or (cost.longest_shared is not None and longest > cost.longest_shared):
        return alone
    together: list[SharedRow] = []
    # Members of similar length share a row, because attention pads suffixes to the longest.
    for row in sorted(alone, key=lambda r: (len(r), r.members[0].member)):
        if together and len(together[-1]) + len(row.members[0].suffix_ids) <= max_tokens:
            together[-1] = SharedRow((*together[-1].members, *row.members))
        else:
            together.append(row)
    if cost.holds and len(together) > 1 and len(members[0].context_ids) > 1:
        together = [SharedRow(row.members, continues=True) for row in together]
    return min(together, alone, key=cost.of)


def _fill(ordered: Sequence[SharedRow], max_tokens: int) -> list[list[SharedRow]]:
    batches: list[list[SharedRow]] = []
    tokens, shares = 0, False  # of the last micro-batch
    for row in ordered:
        tokens, shares = tokens + len(row), shares or row.branches
        # With a shared row all rows are concatenated. Otherwise they are padded to the longest, which is the first.
        if batches and (tokens if shares else len(batches[-1][0]) * (len(batches[-1]) + 1)) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            tokens, shares = len(row), row.branches
    return batches
