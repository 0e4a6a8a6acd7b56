"""Which training questions an epoch asks, and how often: those whose groups are likely to teach something.

A group whose members are all right or all wrong teaches nothing. A selection gives every question a weight from what
earlier groups of it were like. An epoch has as many places as there are questions; they are dealt out in proportion to
the weights. A question is known by the epochs before, and an epoch's places are dealt out when it begins, so a
resumed run, on any number of ranks, goes on in the same order.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import SeedPurpose, derive_generator
from rpo_lightning.core.types import Group, Prompt

Floats = NDArray[np.float64]

# What is known of a question without a group: half a response right and half a one wrong (Jeffreys' prior).
_PRIOR = 0.5


@dataclass(frozen=True)
class QuestionOutcome:
    """What a group of a question was like.

    Attributes:
        uid: The question.
        right: Its right members.
        wrong: Its wrong members.
    """

    uid: str
    right: int
    wrong: int

    @classmethod
    def of(cls, group: Group) -> QuestionOutcome:
        """Look at a group."""
        return cls(group.request.prompt.uid, group.correct_count, len(group.samples) - group.correct_count)


class QuestionSelection(ABC):
    """Base class of selections.

    Attributes:
        decay: What an outcome counts after another epoch, as a share of what it counted before.
    """

    decay: float = 1.0

    @abstractmethod
    def weights(self, right: Floats, wrong: Floats, group_size: int) -> Floats:
        """How often to ask each question, relative to others; all above 0.

        Args:
            right: Right responses to each question so far, decayed, [Q].
            wrong: Wrong ones, [Q].
            group_size: Responses of a group.
        """


class InformativeSelection(QuestionSelection):
    """Asks a question in proportion to the chance that its group will have right and wrong members.

    Args:
        floor: Least weight of a question, above 0 and at most 1. The weight of a question that is always half right is
            close to 1. Questions that seem hopeless or solved are asked again at this rate, since the policy changes.
        decay: What an outcome counts after another epoch, from 0 (forgotten) to 1.

    Raises:
        ConfigurationError: A number is out of its range.
    """

    def __init__(self, floor: float = 0.1, decay: float = 0.8) -> None:
        if not 0 < floor <= 1 or not 0 <= decay <= 1:
            raise ConfigurationError(
                f"data.selection needs 0 < floor <= 1 and 0 <= decay <= 1, got floor={floor} and decay={decay}"
            )
        self.floor = floor
        self.decay = decay

    def weights(self, right: Floats, wrong: Floats, group_size: int) -> Floats:
        """See ``QuestionSelection.weights``."""
        return np.maximum(mixed_chance(right, wrong, group_size), self.floor)


def mixed_chance(right: Floats, wrong: Floats, group_size: int) -> Floats:
    """The chance that a group will have right and wrong members, after right and wrong responses to its question.

    The success rate is not known but has a beta distribution, so a group that was all right does not mean that the next
    one is. Its members are all right with the chance of a beta-binomial distribution.
    """
    a, b = right + _PRIOR, wrong + _PRIOR
    all_right, all_wrong = np.ones_like(a), np.ones_like(b)
    for before in range(group_size):
        all_right *= (a + before) / (a + b + before)
        all_wrong *= (b + before) / (a + b + before)
    return 1 - all_right - all_wrong


class SelectedQuestions:
    """What is known of the training questions, and the order in which an epoch asks them.

    Args:
        prompts: The training questions.
        selection: Gives them weights.
        group_size: Responses of a group.

    Attributes:
        uniform_share: The share of groups with right and wrong members that would be expected in the last epoch that
            was dealt out, if it asked all questions equally often.
    """

    def __init__(self, prompts: Sequence[Prompt], selection: QuestionSelection, group_size: int) -> None:
        self.prompts = prompts
        self.uniform_share = math.nan
        self._numbers = {prompt.uid: number for number, prompt in enumerate(prompts)}
        self._selection = selection
        self._group_size = group_size
        self._epoch: int | None = None  # whose places have been dealt out
        self._known = np.zeros((len(prompts), 2))  # right and wrong responses before this epoch, decayed
        self._seen = np.zeros((len(prompts), 2), np.int64)  # those of this epoch

    def observe(self, outcomes: Iterable[QuestionOutcome]) -> None:
        """Take the outcomes of an iteration, those of all ranks."""
        for outcome in outcomes:
            if outcome.uid in self._numbers:
                self._seen[self._numbers[outcome.uid]] += outcome.right, outcome.wrong

    def order(self, epoch: int) -> list[int]:
        """Numbers of the questions in the order of an epoch; as many as there are questions.

        Raises:
            ConfigurationError: A weight is not finite or not above 0, or there are too many or too few.
        """
        if epoch != self._epoch:
            self._known = self._selection.decay * self._known + self._seen
            self._seen[:] = 0
            self._epoch = epoch
        right, wrong = self._known.T
        self.uniform_share = float(mixed_chance(right, wrong, self._group_size).mean())
        weights = self._selection.weights(right, wrong, self._group_size)
        if weights.shape != right.shape or not (np.isfinite(weights) & (weights > 0)).all():
            raise ConfigurationError(
                f"data.selection: {type(self._selection).__name__}.weights must return a finite number above 0 for "
                f"each of {len(right)} questions"
            )
        generator = derive_generator(SeedPurpose.SELECTION, epoch)
        counts = dealt_out(weights, generator.random())
        # A question's places are spread evenly over the epoch, and so are those of the others.
        chosen = np.repeat(np.arange(len(counts)), counts)
        turn = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
        when = (turn + generator.random(len(chosen))) / counts[chosen]
        order: list[int] = chosen[np.argsort(when, kind="stable")].tolist()
        return order

    def state_dict(self) -> dict[str, Any]:
        """What is known, as tensors and primitives; questions that nothing is known of are left out."""
        is_known = (self._known + self._seen).sum(axis=1) > 0
        return {
            "epoch": self._epoch,
            "uids": json.dumps([uid for uid, number in self._numbers.items() if is_known[number]]),
            "known": torch.from_numpy(self._known[is_known]),
            "seen": torch.from_numpy(self._seen[is_known]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what was known. Questions that are no longer there are left out."""
        self._epoch, self._known[:], self._seen[:] = state["epoch"], 0, 0
        for uid, known, seen in zip(json.loads(state["uids"]), state["known"], state["seen"], strict=True):
            if uid in self._numbers:
                self._known[self._numbers[uid]] = known.numpy()
                self._seen[self._numbers[uid]] = seen.numpy()


def dealt_out(weights: Floats, offset: float) -> NDArray[np.int64]:
    """How many places each question gets, as many in all as there are questions.

    A question's number is its share of the places, rounded down or up so that it is right on average.

    Args:
        weights: Weights of the questions, [Q], all above 0.
        offset: A random number in [0, 1).
    """
    ends = np.cumsum(weights) * (len(weights) / weights.sum())
    ends[-1] = len(weights)  # whatever rounding made of it
    counts = np.diff(np.floor(np.minimum(ends, len(weights)) + offset), prepend=0.0)
    return counts.astype(np.int64)


class SelectedSampler(DistributedSampler[Prompt]):
    """Deals the selected questions of an epoch out to ranks, which take turns.

    Args:
        questions: The training questions.
        ranks: Number of ranks.
        rank: This rank.
    """

    def __init__(self, questions: SelectedQuestions, ranks: int, rank: int) -> None:
        super().__init__(questions.prompts, ranks, rank)  # type: ignore[arg-type]
        self._questions = questions

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        order = self._questions.order(self.epoch)
        order += order[: self.total_size - len(order)]  # so that all ranks have equally many
        return iter(order[self.rank :: self.num_replicas])
