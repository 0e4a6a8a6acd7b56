"""Ends of reasoning steps in token ids: a cut may be moved to the nearest one.

Which tokens end a step is looked up in a table over the vocabulary, made once for a tokenizer. No response is decoded.
"""

from __future__ import annotations

import numpy as np


class StepEnds:
    """Finds the ends of steps.

    Args:
        ends_step: For each token id, whether a step ends after it, bool, [V].
    """

    def __init__(self, ends_step: np.ndarray) -> None:
        self._ends_step = ends_step

    def nearest(self, token_ids: np.ndarray, prefix_length: int) -> int:
        """The prefix length nearest to a given one at which a step ends.

        Args:
            token_ids: The tokens that may be kept.
            prefix_length: The length of the prefix before it is moved, at least 1.

        Returns:
            A length of at least 1. The shorter one of two equally near ones. ``prefix_length`` if no step ends.
        """
        known = token_ids < len(self._ends_step)
        ends = np.flatnonzero(self._ends_step[np.where(known, token_ids, 0)] & known) + 1
        if not len(ends):
            return prefix_length
        place = int(np.searchsorted(ends, prefix_length))
        near = ends[max(place - 1, 0) : place + 1]
        return int(near[np.argmin(np.abs(near - prefix_length))])
