"""Metrics over questions with several answers each, as torchmetrics.

A metric is the mean of one value for each question. Values are stored with their question's key, and each question
counts once, because distributed samplers repeat questions to give all ranks equally many.

Shapes: Q questions, N answers to each.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.hashing import stable_hash


class QuestionMetric(Metric):
    """Base class: stores a value for each question, and returns their mean.

    Subclasses compute the values in ``update`` and pass them to ``add``.
    """

    full_state_update = False
    is_differentiable = False
    keys: list[Tensor]
    per_question: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("per_question", [], dist_reduce_fx="cat")

    @abstractmethod
    def update(self, *_: Any, **__: Any) -> None:
        """Add questions."""

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Store the values [Q] of questions with keys [Q]."""
        self.keys.append(keys.to(self.device))
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.per_question.append(values.to(dtype).to(self.device))

    def compute(self) -> Tensor:
        """The mean over questions."""
        return self._unique().mean()

    def values(self) -> Tensor:
        """The value of each question over all ranks, [Q], sorted by key; a collective."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=True):
            return self._unique()

    def _unique(self) -> Tensor:
        keys = dim_zero_cat(self.keys)
        order = keys.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = keys[order][1:] != keys[order][:-1]
        values: Tensor = dim_zero_cat(self.per_question)[order][first]
        return values


class AverageAtK(QuestionMetric):
    """avg@k: the share of right answers among all sampled ones."""

    higher_is_better = True

    def update(self, keys: Tensor, correct: Tensor) -> None:
        """Add questions with keys [Q] and verdicts [Q, N]."""
        self.add(keys, correct.double().mean(1))


class PassAtK(QuestionMetric):
    """pass@k: the chance that at least one of k answers is right; unbiased for N ≥ k (Chen et al. 2021, eq. 1).

    Args:
        k: Number of answers drawn.
        kwargs: See ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ConfigurationError(f"PassAtK.k must be at least 1, got {k}")
        self.k = k

    def update(self, keys: Tensor, correct: Tensor) -> None:
        """Add questions with keys [Q] and verdicts [Q, N].

        Raises:
            ConfigurationError: There are fewer than k answers to a question.
        """
        n = correct.shape[1]
        if n < self.k:
            raise ConfigurationError(
                f"pass@{self.k} needs at least {self.k} answers a question, there are {n}: raise "
                "model.evaluation.samples, or use a smaller k"
            )
        right = correct.sum(1).double()
        # 1 - C(N - c, k) / C(N, k), as a product over the drawn answers.
        missed = torch.ones_like(right)
        for drawn in range(self.k):
            missed *= ((n - right - drawn) / (n - drawn)).clamp(min=0.0)
        self.add(keys, 1.0 - missed)


class MajorityAtK(QuestionMetric):
    """majority@k: whether the most frequent answer is right. A tie counts as the share of right answers in it."""

    higher_is_better = True

    def update(self, keys: Tensor, correct: Tensor, classes: Tensor) -> None:
        """Add questions.

        Args:
            keys: Keys of the questions, [Q].
            correct: Verdicts, [Q, N].
            classes: Equal numbers for equivalent answers, [Q, N]; -1 for a response without an answer, which does not
                vote.
        """
        self.add(keys, torch.tensor([_majority(c, r) for c, r in zip(classes.tolist(), correct.tolist(), strict=True)]))


class QuestionMean(QuestionMetric):
    """The mean over questions of the mean of a quantity over a question's answers."""

    def update(self, keys: Tensor, quantity: Tensor) -> None:
        """Add questions with keys [Q] and quantities [Q, N]."""
        self.add(keys, quantity.double().mean(1))


def question_key(uid: str) -> int:
    """The key of a question: a 63-bit hash of its uid."""
    return stable_hash(uid) >> 1


def bootstrap_means(values: Tensor, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap: means of the values of questions drawn with replacement, [resamples]."""
    array = values.cpu().numpy()
    rng = np.random.default_rng(seed)
    return np.asarray([array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)])


def _majority(classes: list[int], correct: list[bool]) -> float:
    votes = {c: classes.count(c) for c in classes if c >= 0}
    if not votes:
        return 0.0
    elected = {c for c, count in votes.items() if count == max(votes.values())}
    verdicts = [float(right) for c, right in zip(classes, correct, strict=True) if c in elected]
    return sum(verdicts) / len(verdicts)
