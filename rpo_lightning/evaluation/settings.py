"""``model.evaluation``: the settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.rollout.engine import Sampling


@dataclass(frozen=True)
class EvaluationSettings:
    """How ``validate``, ``test`` and ``predict`` sample answers.

    Attributes:
        sampling: How tokens are drawn; as in training if not given.
        samples: Answers to each question: the n of avg@n, pass@k (k up to n) and majority@n.
    """

    sampling: Sampling | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigurationError(f"model.evaluation.samples must be at least 1, got {self.samples}")
