"""Rewards that judge correctness and form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rpo_lightning.core.hashing import stable_hash
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import Reward

# A tag that the prompt has already is part of the response that rewards see.
# Text without certain tags is matched from one "<" to the next, which is faster than character by character.
_FORMAT = re.compile(
    r"\s*<think>[^<]*+(?:<(?!/?think>|/?answer>)[^<]*+)*</think>"
    r"\s*<answer>[^<]*+(?:<(?!/?answer>)[^<]*+)*</answer>\s*"
)


class AccuracyReward(Reward):
    """The verifier's verdict."""

    def score(self, group: Sequence[Sample]) -> list[float]:
        """1 for right, 0 for wrong."""
        return [sample.correct for sample in group]


class FormatReward(Reward):
    """1 where the response is one ``<think>…</think>`` and one ``<answer>…</answer>``, else 0.

    Thoughts that the prompt opens or leaves empty count as the response's.
    """

    def score(self, group: Sequence[Sample]) -> list[float]:
        """Whether each response has the form."""
        return [float(_FORMAT.fullmatch(sample.response) is not None) for sample in group]


class UniformRandomReward(Reward):
    """Noise in [0, 1): the control that shows whether learning comes from the reward.

    Depends on the response alone, so that a resumed run gets the same noise.
    """

    def score(self, group: Sequence[Sample]) -> list[float]:
        """A hash of each response, as a number."""
        return [stable_hash(f"{s.prompt}\0{s.response}") / 2**64 for s in group]
