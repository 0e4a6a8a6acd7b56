"""Rows: what is computed together, so that a prompt and its kept prefix are computed once per group.

A :class:`SharedRow` is one row of a forward pass: prompt and prefix once (its *context*), then the suffixes
of several members of a group. With one member it is an ordinary row. Every suffix sees the context and
itself only, so each member's log-probs and gradients are those of a row of its own, to rounding; the
context stays on the autograd graph and receives the sum of the members' gradients.

Members are spread over several rows where a group is longer than a micro-batch; the context is then
repeated, and as gradients add up the result is the same. Where sharing costs more than it saves (next to
no context, long suffixes), every member has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rpo_lightning.core.types import Group

LossScope = Literal["suffix", "response"]


@dataclass(frozen=True)
class Row:
    """One response, ready to be computed.

    Attributes:
        group: Index of its group in the batch.
        member: Index within the group.
        context_ids: Prompt and kept prefix, the same for all members of a group.
        suffix_ids: What this member sampled.
        scope_length: Number of tokens at the end that are in the loss scope.
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
    """Rows of one group that are computed as one."""

    members: tuple[Row, ...]

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Prompt and kept prefix."""
        return self.members[0].context_ids

    @property
    def branches(self) -> bool:
        """Whether there are suffixes to keep apart."""
        return len(self.members) > 1

    def shape(self, detached: int = 0) -> RowShape:
        """Its parts, the first ``detached`` tokens of the context apart."""
        return RowShape(detached, len(self.context_ids) - detached, tuple(len(row.suffix_ids) for row in self.members))

    def __len__(self) -> int:
        return len(self.context_ids) + sum(len(row.suffix_ids) for row in self.members)


@dataclass(frozen=True)
class RowShape:
    """How many tokens the parts of a row have.

    Attributes:
        detached: Beginning of the context, whose keys and values come from an earlier pass.
        context: The rest of the context.
        suffixes: Each suffix.
    """

    detached: int
    context: int
    suffixes: tuple[int, ...]

    @property
    def branches(self) -> bool:
        """Whether there are suffixes to keep apart."""
        return len(self.suffixes) > 1

    def __len__(self) -> int:
        """Tokens that are computed."""
        return self.context + sum(self.suffixes)


@dataclass(frozen=True)
class RowCost:
    """Relative cost of computing a row.

    Attributes:
        attention: Cost of a query–key pair, where a token's matrix products cost 1; 0 ignores attention.
        branch: Extra cost of a suffix's token in a row of several members, which gathers and merges it.
        shares: Whether members may share a row at all.
        context: Cost of a context's token, where a suffix's costs 1; a third without gradient through the context.
        longest_shared: Longest sequence (context and one suffix) that may be in a shared row: attention of
            shared rows knows no windows and chunks, and some rotary embeddings are others beyond it.
    """

    attention: float = 0.0
    branch: float = 0.0
    shares: bool = True
    longest_shared: int | None = None
    context: float = 1.0

    def of(self, row: SharedRow) -> float:
        """Cost of a row. Suffixes on a context are computed as long as the longest."""
        context, longest = len(row.context_ids), max(len(member.suffix_ids) for member in row.members)
        pairs = self.context * context**2 / 2 + len(row.members) * (longest * context + longest**2 / 2)
        suffixes = (len(row) - context) * (1.0 + (self.branch if row.branches else 0.0))
        return self.context * context + suffixes + self.attention * pairs


def rows_of(groups: Sequence[Group], scope: LossScope) -> list[Row]:
    """The rows of all members of all groups."""
    rows = []
    for index, group in enumerate(groups):
        context = group.request.prompt.token_ids + group.request.prefix_ids
        for member, completion in enumerate(group.completions):
            in_scope = len(completion.token_ids) + (len(group.request.prefix_ids) if scope == "response" else 0)
            rows.append(Row(index, member, context, completion.token_ids, in_scope))
    return rows


def shared_rows(rows: Sequence[Row], max_tokens: int, cost: RowCost) -> list[SharedRow]:
    """Put the members of each group together as far as that is cheapest and fits into ``max_tokens``."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [shared for members in groups.values() for shared in _cheapest(members, max_tokens, cost)]


def micro_batches(
    rows: Sequence[SharedRow], max_tokens: int, longest_shared: int | None = None
) -> list[list[SharedRow]]:
    """Split into as few micro-batches of at most ``max_tokens`` tokens as needed, padding included, of similar size.

    A row longer than that makes a micro-batch of its own. Long rows come first, so that memory peaks early.

    Args:
        rows: What is to be computed.
        max_tokens: Tokens of a micro-batch.
        longest_shared: See :class:`RowCost`. Longer rows never stand beside shorter ones: the whole micro-batch
            would be computed without the window, or with the rotary embedding of the longest.
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
    while low < high:  # the smallest limit that needs no more micro-batches makes them even
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
    # Similar lengths together: suffixes are computed as long as the longest of their row.
    for row in sorted(alone, key=lambda r: (len(r), r.members[0].member)):
        if together and len(together[-1]) + len(row.members[0].suffix_ids) <= max_tokens:
            together[-1] = SharedRow((*together[-1].members, *row.members))
        else:
            together.append(row)
    return min(together, alone, key=lambda rows: sum(cost.of(row) for row in rows))


def _fill(ordered: Sequence[SharedRow], max_tokens: int) -> list[list[SharedRow]]:
    batches: list[list[SharedRow]] = []
    tokens, shares = 0, False  # of the last micro-batch
    for row in ordered:
        tokens, shares = tokens + len(row), shares or row.branches
        # Where one is shared rows lie end to end, else they are padded to the longest, which comes first.
        if batches and (tokens if shares else len(batches[-1][0]) * (len(batches[-1]) + 1)) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            tokens, shares = len(row), row.branches
    return batches
