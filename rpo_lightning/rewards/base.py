"""What verifiers and rewards are.

A *verifier* compares a response with the gold answer; its verdict decides what counts as correct for
the cache, the metrics and the length rewards. A *reward* is one weighted term of the total reward and
sees a whole group, since length rewards compare its members. Both score the whole response, prefix
included (section 3 of the paper).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.arguments import Arguments
from rpo_lightning.rewards.calls import in_this_process
from rpo_lightning.rewards.pool import GradingPool


class Verifier(ABC):
    """Decides whether a response is right.

    ``verify`` may take columns of the question's row: as further parameters by their names, or all as ``**row``.

    Attributes:
        isolated: Whether ``verify`` may hang or crash and so runs in a worker process.
    """

    isolated: bool = True

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Import what ``verify`` needs, in the trainer's process before workers are forked: each has it then."""

    @abstractmethod
    def verify(self, prompt: str, response: str, answer: str) -> float:
        """Verdict in [0, 1]; 1 is right. Must be picklable where ``isolated`` is true."""

    @property
    def arguments(self) -> Arguments:
        """Which columns ``verify`` is given."""
        return Arguments(self.verify)

    @property
    def tells_answers(self) -> bool:
        """Whether it can tell final answers and compare them, which majority votes need."""
        return False

    def of_row(self, row: Mapping[str, Any]) -> Verifier:
        """The verifier of the question with this row: itself, unless it leaves rows to others."""
        return self

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Why a question with this row cannot be judged, and what to do; ``None`` if it can."""
        return self.arguments.problem(row, type(self).__name__)

    def gold_problem(self, answer: str) -> str | None:
        """Why a gold answer cannot be compared with, or ``None`` if it can."""
        return None if answer.strip() else "it is empty"

    def is_only_text(self, answer: str) -> bool:
        """Whether nothing but its own text equals a gold answer, as with words; the load report counts these."""
        return False


class AnswerVerifier(Verifier):
    """A verifier that can tell final answers and compare them, which majority votes need."""

    @property
    def tells_answers(self) -> bool:
        """Always."""
        return True

    @abstractmethod
    def final_answer(self, response: str) -> Any:
        """The final answer in a response, in whatever form ``same`` compares; ``None`` if there is none."""

    @abstractmethod
    def same(self, first: Any, second: Any) -> bool:
        """Whether two final answers are equivalent."""

    def answer_classes(self, *responses: str) -> list[int]:
        """Number the answers to one question: equivalent ones get equal numbers, a missing one -1."""
        representatives: list[Any] = []
        classes = []
        for response in responses:
            answer = self.final_answer(response)
            if answer is None:
                classes.append(-1)
                continue
            known = next((i for i, other in enumerate(representatives) if self.same(other, answer)), None)
            if known is None:
                known = len(representatives)
                representatives.append(answer)
            classes.append(known)
        return classes


class Reward(ABC):
    """One term of the total reward.

    Args:
        weight: Factor of the term in the sum.

    Attributes:
        response_function: Gives the value of a response from its prompt, its text, the gold answer and the columns that
            its parameters name (``Arguments``), in a worker process, as soon as the response has ended. ``None``
            where a term is computed from whole groups.
        isolated: Whether ``score_groups`` uses the worker processes, which are then started before decoding.
    """

    response_function: Callable[..., float | None] | None = None
    isolated: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        if not math.isfinite(weight):
            raise ConfigurationError(f"model.rewards: the weight of {type(self).__name__} is {weight}: give a number")
        self.weight = weight

    @property
    def name(self) -> str:
        """Name of the term in metrics."""
        words = type(self).__name__.removesuffix("Reward")
        return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(words))

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Why the term cannot be computed for questions with this row, and what to do; ``None`` if it can."""
        function = self.response_function
        return None if function is None else Arguments(function).problem(row, f"reward {self.name!r}")

    @abstractmethod
    def score(self, group: Sequence[Sample]) -> Sequence[float | None]:
        """Unweighted values of the members of one group; ``None`` where the term does not apply."""

    def score_groups(self, groups: Sequence[Sequence[Sample]], pool: GradingPool) -> Sequence[Sequence[float | None]]:
        """Unweighted values of several groups; terms that compare responses in worker processes override this."""
        values = []
        for group in groups:
            with in_this_process(f"reward {self.name!r}", group[0]):
                values.append(self.score(group))
        return values
