"""The evaluation of one set of questions: metrics with confidence intervals, and a record of each question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from rpo_lightning.core.types import Group
from rpo_lightning.evaluation.metrics import (
    AverageAtK,
    MajorityAtK,
    PassAtK,
    QuestionMean,
    QuestionMetric,
    bootstrap_means,
    question_key,
)

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % bootstrap interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        resampled: Means of the resamples, [resamples].
    """

    value: float
    low: float
    high: float
    resampled: np.ndarray

    @classmethod
    def of_values(cls, values: Tensor, seed: int = 0) -> Estimate:
        """Mean and interval of one value for each question, [Q]."""
        return cls.of(float(values.mean()), bootstrap_means(values, seed=seed))

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Estimate:
        """A mean with the percentile interval of its resamples."""
        low, high = np.percentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        return cls(value, float(low), float(high), resampled)


class Evaluation:
    """Collects the answers to one set of questions.

    Args:
        name: Name of the set; empty for a single set.
        n: Answers to each question.
        votes: Whether the verifier can group equivalent answers, as majority@k needs.
        device: The device on which ranks exchange metrics.
        keeps_answers: Whether to collect ``rows``. Validations of a training run do not need them.

    Attributes:
        questions: Number of questions answered on this rank.
        votes: Whether majority@n is computed: ``votes`` was given and n > 1.
        rows: One record for each question.
    """

    def __init__(self, name: str, n: int, votes: bool, device: torch.device, keeps_answers: bool = True) -> None:
        self.name = name
        self.questions = 0
        self.votes = votes and n > 1
        self._keeps_answers = keeps_answers
        self.rows: list[dict[str, Any]] = []
        metrics: dict[str, QuestionMetric] = {"accuracy": AverageAtK()}
        if n > 1:
            powers = [2**i for i in range(1, n.bit_length())]
            metrics |= {f"pass@{k}": PassAtK(k) for k in sorted({*powers, n}) if k <= n}
            if self.votes:
                metrics[f"majority@{n}"] = MajorityAtK()
        # Compute groups would merge metrics whose states happen to be equal after the first update.
        self._verdicts = MetricCollection(metrics, compute_groups=False).to(device)  # type: ignore[arg-type]
        self._quantities = {"response_tokens": QuestionMean().to(device), "truncated_share": QuestionMean().to(device)}

    def add(self, groups: Sequence[Group], classes: Sequence[Sequence[int]] | None = None) -> None:
        """Add answered questions.

        Args:
            groups: Their scored answers, one group a question.
            classes: For each question, equal numbers for equivalent answers; ``None`` if they are not known.
        """
        keys = torch.tensor([question_key(g.request.prompt.uid) for g in groups])
        correct = torch.tensor([[s.is_correct for s in g.samples] for g in groups])
        voted = torch.tensor(classes) if classes else torch.full(correct.shape, -1)
        self._verdicts.update(keys=keys, correct=correct, classes=voted)
        lengths = torch.tensor([[s.length for s in g.samples] for g in groups])
        truncated = torch.tensor([[not s.finished for s in g.samples] for g in groups])
        self._quantities["response_tokens"].update(keys, lengths)
        self._quantities["truncated_share"].update(keys, truncated)
        self.questions += len(groups)
        if self._keeps_answers:
            self.rows += [self._row(g, c) for g, c in zip(groups, voted.tolist(), strict=True)]

    def means(self) -> dict[str, float]:
        """Every metric over all ranks; a collective."""
        return {name: float(metric.compute()) for name, metric in self._metrics().items()}

    def estimates(self) -> dict[str, Estimate]:
        """Every metric over all ranks with its interval; a collective."""
        values = {name: metric.values() for name, metric in self._metrics().items()}
        # A seed for each set: with shared draws, the interval of an average over sets of equal size would be wrong.
        seed = question_key(self.name)
        return {name: Estimate.of_values(v, seed) for name, v in values.items()}

    def _metrics(self) -> dict[str, Any]:
        return {**dict(self._verdicts.items()), **self._quantities}

    def _row(self, group: Group, classes: Sequence[int]) -> dict[str, Any]:
        prompt = group.request.prompt
        return {
            "set": self.name,
            "uid": prompt.uid,
            "question": prompt.text,
            "gold_answer": str(prompt.answer),
            "responses": [s.response for s in group.samples],
            "correct": [s.is_correct for s in group.samples],
            "answer_classes": list(classes),
            "tokens": [s.length for s in group.samples],
            "finished": [s.finished for s in group.samples],
        }


def average(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Average each metric that all sets have over the sets, every set with the same weight."""
    sets = list(estimates.values())
    common = [name for name in sets[0] if all(name in other for other in sets)]
    return {
        name: Estimate.of(
            float(np.mean([s[name].value for s in sets])), np.mean([s[name].resampled for s in sets], axis=0)
        )
        for name in common
    }
