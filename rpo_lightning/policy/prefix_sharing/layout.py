"""Token ids, positions and scored tokens of a micro-batch, made on the host and sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.policy.output_head import Targets
from rpo_lightning.policy.prefix_sharing.arrangement import Arrangement
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION, SharedLayout
from rpo_lightning.policy.prefix_sharing.rows import RowShape, SharedRow
from rpo_lightning.policy.prefix_sharing.transfer import sent_together


class BatchLayout:
    """Places the rows of a micro-batch.

    If no row is shared, rows are stacked and padded on the right. Otherwise they are concatenated without padding, as
    ``Arrangement`` says.

    Args:
        batch: The rows.
        pad_id: Any token id; fills padded positions.
        detached_lengths: Number of detached tokens of each row's context; these are not computed here.
        concatenated: Concatenate rows even if none is shared.

    Attributes:
        rows: The responses, in the order of the rows and their members.
        lengths: Number of tokens in each response's loss scope.
    """

    def __init__(
        self,
        batch: Sequence[SharedRow],
        pad_id: int,
        detached_lengths: Sequence[int] | None = None,
        concatenated: bool = False,
    ) -> None:
        self._shapes = [
            shared.shape(detached) for shared, detached in zip(batch, detached_lengths or [0] * len(batch), strict=True)
        ]
        self.rows = [row for shared in batch for row in shared.members]
        self._is_concatenated = concatenated or any(shared.branches for shared in batch)
        if self._is_concatenated:
            self._arrangement = Arrangement.of(self._shapes)
            self._shape = (1, self._arrangement.tokens)
            starts = list(zip(self._arrangement.context_starts, self._arrangement.suffix_starts, strict=True))
        else:
            width = max(len(shape) for shape in self._shapes)
            self._shape = (len(batch), width)
            starts = [(i * width, i * width + shape.context) for i, shape in enumerate(self._shapes)]
        self._ids = np.full(self._shape[0] * self._shape[1], pad_id, dtype=np.int64)
        self._positions = np.zeros_like(self._ids)
        self._predecessors: list[np.ndarray] = []  # where the token before each scored token is
        self._targets: list[np.ndarray] = []  # where each scored token is
        self._scope: list[tuple[slice, slice]] = []  # scored tokens of each response: of its context, and its own
        self._scored = 0
        for shared, shape, (context_start, suffix_start) in zip(batch, self._shapes, starts, strict=True):
            self._place(shared, shape, context_start, suffix_start)
        self.lengths = [_length(of_context) + _length(own) for of_context, own in self._scope]

    def _place(self, shared: SharedRow, shape: RowShape, context_start: int, start: int) -> None:
        """Write the ids of one row, and note which of them are scored: those of the context once for all members."""
        self._write(context_start, shared.context_ids[shape.detached :], shape.detached)
        in_scope = max(row.scope_length - len(row.suffix_ids) for row in shared.members)
        end_of_context = context_start + shape.context
        scored = np.arange(end_of_context - in_scope, end_of_context)
        of_context = self._score(scored - 1, scored)
        for row in shared.members:
            self._write(start, row.suffix_ids, shape.detached + shape.context)
            scored = np.arange(start, start + len(row.suffix_ids))
            predecessors = scored - 1
            predecessors[:1] = end_of_context - 1  # the last token of the context predicts every suffix's first
            self._scope.append((of_context, self._score(predecessors, scored)))
            start += len(row.suffix_ids)

    def _write(self, start: int, ids: Sequence[int], position: int) -> None:
        self._ids[start : start + len(ids)] = ids
        self._positions[start : start + len(ids)] = np.arange(position, position + len(ids))

    def _score(self, predecessors: np.ndarray, targets: np.ndarray) -> slice:
        self._predecessors.append(predecessors)
        self._targets.append(targets)
        self._scored += len(targets)
        return slice(self._scored - len(targets), self._scored)

    def inputs(
        self, device: torch.device, attention: str, temperature: float, entropy_gradient: bool = False
    ) -> tuple[dict[str, Any], Targets, Tensor]:
        """What a forward pass needs, on the device.

        Args:
            device: Where the model is.
            attention: The model's attention implementation.
            temperature: Divides the logits.
            entropy_gradient: Whether the entropies have a gradient.

        Returns:
            The model's arguments, the scored tokens, and the indices of every response's scored tokens, right-aligned,
            [B, S], -1 at padding.

        Raises:
            UpdateError: Rows are concatenated, and the model has another attention than ``attention.py``'s.
        """
        if self._is_concatenated and attention != IMPLEMENTATION:
            raise UpdateError(
                f"shared rows need attention {IMPLEMENTATION!r}, the model has {attention!r}: call "
                f"model.set_attn_implementation({IMPLEMENTATION!r})"
            )
        tokens = self._ids[np.concatenate(self._targets)]
        on_host = [self._ids.reshape(self._shape), np.concatenate(self._predecessors), tokens, self._scope_index()]
        if self._is_concatenated:  # otherwise the model counts positions itself
            on_host.append(self._positions.reshape(self._shape))
        sent = sent_together([torch.from_numpy(x) for x in on_host], device)
        ids_BT, position_K, token_K, index_BS, *positions = sent
        inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
        if self._is_concatenated:
            inputs["position_ids"] = positions[0]
            # With four dimensions the model takes it as final and makes no mask. Our attention ignores it.
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
            inputs["shared_layout"] = SharedLayout(self._arrangement, device)
        return inputs, Targets(position_K, token_K, temperature, entropy_gradient), index_BS

    def _scope_index(self) -> np.ndarray:
        index_BS = np.full((len(self.rows), max(self.lengths)), -1, dtype=np.int64)
        for line, length, (of_context, own) in zip(index_BS, self.lengths, self._scope, strict=True):
            line[len(line) - length :] = np.r_[of_context, own]
        return index_BS


def _length(part: slice) -> int:
    return int(part.stop - part.start)
