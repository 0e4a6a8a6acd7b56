"""RLOO: the baseline of a response is the mean reward of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Group
from rpo_lightning.update.advantages.base import AdvantageEstimator, centred, total_rewards


class RLOO(AdvantageEstimator):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): ``r_i - 1/(G-1) · Σ_{j≠i} r_j``.

    A response's baseline does not depend on its own reward, so the gradient is unbiased. The advantages are G/(G-1)
    times those of ``Unscaled``. The KL penalty is in the loss
    (``model.objective.beta``), not in the reward as in the paper.
    """

    def advantages(self, groups: Sequence[Group], reward_weights: Mapping[str, float], ranks: Ranks) -> list[Tensor]:
        """Rewards minus the mean of the other members'."""
        return [centred(r) * len(r) / (len(r) - 1) for r in total_rewards(groups)]
