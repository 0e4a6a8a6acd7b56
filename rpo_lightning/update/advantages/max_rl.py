"""MaxRL: advantages are divided by the group's mean reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.update.advantages.base import AdvantageEstimator, centred, total_rewards


class MaxRL(AdvantageEstimator):
    """Maximum Likelihood Reinforcement Learning (arXiv 2602.02710): ``(r_i - mean r) / mean r`` over the group.

    With rewards of 0 and 1 the gradient is that of the mean score of the right responses, minus a term whose
    expectation is zero. Its expectation is the gradient of log p, for a success rate p, cut off at G terms. Hard
    questions weigh about 1/p.

    The paper leaves the loss of a token alone and changes only the advantage, so it is an estimator here and no
    objective. A group with a mean of 0 gets zeros, as in the paper's equations; its code adds 1e-6 to the mean instead.
    """

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Centred and divided by the mean within each group.

        Raises:
            UpdateError: A reward is negative: the mean would be no success rate.
        """
        for group in groups:
            if min(group.rewards) < 0:
                raise UpdateError(
                    "model.update.advantages=MaxRL divides by the mean reward and needs rewards of at least 0: "
                    f"question {group.request.prompt.uid} has {min(group.rewards):g}. Leave out the rewards that "
                    "penalise, or choose another estimator"
                )
        return [_divided(r) for r in total_rewards(groups)]


def _divided(rewards: Tensor) -> Tensor:
    mean = rewards.mean()
    return centred(rewards) / mean if mean > 0 else torch.zeros_like(rewards)
