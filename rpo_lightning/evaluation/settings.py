"""``model.evaluation``: how evaluation answers are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.rollout.engine import Sampling


@dataclass(frozen=True)
class EvaluationSettings:
    """How ``validate``, ``test`` and ``predict`` draw answers.

    Attributes:
        sampling: How tokens are drawn; as in training if not given.
        samples: Answers per question (the k of avg@k and pass@k).
    """

    sampling: Sampling | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigurationError(f"model.evaluation.samples must be at least 1, got {self.samples}")
