"""GDPO: each term of the reward is normalised before the terms are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.update.advantages.base import EPSILON, AdvantageEstimator, batch_moments


class GDPO(AdvantageEstimator):
    """Group reward-Decoupled Normalization Policy Optimization (arXiv 2601.05242).

    With term k of the reward, its weight ``w_k``, and mean and deviation over the group in the first line, over the
    whole batch in the second:

        a_i = Σ_k w_k · (r_ki - mean r_k) / std r_k
        A_i = (a_i - mean a) / std a

    Equal sums may be made of different terms, which stay apart here, and no term drowns another by its scale. The
    second line keeps the size of advantages independent of the number of terms. The paper and TRL take its moments over
    responses, as here; verl takes them over tokens. A term that is missing for a response (``None`` or NaN) is left out
    for it.
    """

    learns_from_equal_rewards: ClassVar[bool] = True

    def caveat(self, reward_weights: Mapping[str, float]) -> str | None:
        """One term has nothing to be kept apart from."""
        if sum(weight != 0 for weight in reward_weights.values()) > 1:
            return None
        return (
            "model.update.advantages=GDPO normalises each reward by itself, and model.rewards has one: only its "
            "normalisation over the batch has an effect"
        )

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Terms centred and scaled within each group, weighted, summed, and normalised over the batch.

        Raises:
            UpdateError: A group lacks the values of a term.
        """
        sums = [sum_of_normalised_terms(group, reward_weights) for group in groups]
        mean, deviation = batch_moments(sums, ranks)
        return [(a - mean) / (deviation + EPSILON) for a in sums]


def sum_of_normalised_terms(group: Group, reward_weights: Mapping[str, float]) -> Tensor:
    """The first line of the formula for one group, [G], float64."""
    total = torch.zeros(len(group.rewards), dtype=torch.float64)
    for name, weight in reward_weights.items():
        if name not in group.reward_terms:
            raise UpdateError(
                f"model.update.advantages=GDPO needs the values of reward {name!r}, and the group of question "
                f"{group.request.prompt.uid} has none"
            )
        total += weight * _normalised(group.reward_terms[name])
    return total


def _normalised(values: Sequence[float | None]) -> Tensor:
    """Centred and scaled; 0 where a value is missing."""
    term = torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)
    known = ~term.isnan()
    if known.sum() < 2:
        return torch.zeros_like(term)
    return torch.where(known, (term - term[known].mean()) / (term[known].std() + EPSILON), 0.0)
