"""The grading of one rollout: responses are submitted as they end, groups are scored when all have.

What is computed for each response by itself, in a worker process, begins at once: isolated verdicts, and rewards with a
``response_function``. Everything else is computed at the end, in this process. Verdicts come first, since rewards may
look at them. Results, errors and their order do not depend on the order in which responses end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from rpo_lightning.core.errors import RewardError, one_line
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import Reward, Verifier
from rpo_lightning.rewards.calls import collect_results, in_this_process, question, submit_sample
from rpo_lightning.rewards.pool import Call, GradingPool

log = logging.getLogger(__name__)

# A verdict may miss 0 or 1 by so much: nine ninths add up to more than 1.
_ROUNDING = 1e-6

# The place of a response: its group, and its number there.
_Place = tuple[int, int]


@dataclass(frozen=True)
class GradedGroup:
    """Verdicts and rewards of one group.

    Attributes:
        samples: The members with their verdicts.
        rewards: Weighted sum of the terms that apply, one a member.
        terms: Unweighted values of each term; ``None`` where it does not apply.
    """

    samples: list[Sample]
    rewards: list[float]
    terms: dict[str, list[float | None]]


class Grading:
    """Collects the responses of a rollout and scores its groups. Its workers are started before it takes any.

    Args:
        verifier: Decides what is right.
        rewards: Terms of the total reward.
        pool: Where calls that may hang are made.
        odd_scores: Watches scores that are likely mistakes.
    """

    def __init__(self, verifier: Verifier, rewards: Sequence[Reward], pool: GradingPool, odd_scores: OddScores) -> None:
        self._verifier = verifier
        self._rewards = rewards
        self._pool = pool
        self._odd_scores = odd_scores
        self._samples: dict[_Place, Sample] = {}
        self._verdicts: dict[_Place, Call[Any]] = {}
        self._values: dict[str, dict[_Place, Call[Any]]] = {r.name: {} for r in rewards if r.response_function}
        if verifier.isolated:
            verifier.prepare()
        if verifier.isolated or self._values or any(reward.isolated for reward in rewards):
            pool.start()

    def submit(self, group: int, member: int, sample: Sample) -> None:
        """Take a response, and begin what can be computed for it alone.

        Args:
            group: Number of its group.
            member: Number of the response in the group.
            sample: The response.
        """
        place = (group, member)
        self._samples[place] = sample
        verifier = self._verifier.of_row(sample.row)
        if verifier.isolated:
            texts, columns = (sample.prompt, sample.response, sample.answer), verifier.arguments.columns(sample.row)
            self._verdicts[place] = self._pool.submit(verifier.verify, *texts, named=columns)
        for reward in self._rewards:
            if reward.response_function is not None:
                self._values[reward.name][place] = submit_sample(self._pool, reward.response_function, sample)

    def finish(self) -> list[GradedGroup]:
        """Wait for what was begun, and score the groups that have been submitted, in order.

        Raises:
            RewardError: A verdict or a value of a term is no finite number, or a term's values are too many or too few.
        """
        groups = self._verified()
        terms = {reward.name: self._term(reward, groups) for reward in self._rewards}
        graded = []
        for i, group in enumerate(groups):
            of_group = {name: values[i] for name, values in terms.items()}
            applied = [[(r.weight, of_group[r.name][member]) for r in self._rewards] for member in range(len(group))]
            totals = [sum(weight * value for weight, value in terms if value is not None) for terms in applied]
            graded.append(GradedGroup(group, _finite(totals, group, "the weighted sum of model.rewards"), of_group))
        self._odd_scores.look_at(graded)
        return graded

    def cancel(self) -> None:
        """Give up what was begun and is not done."""
        if self._verdicts or any(self._values.values()):
            self._pool.close()

    def _verified(self) -> list[list[Sample]]:
        """The groups with the verifier's verdicts."""
        groups: dict[int, list[Sample]] = {}
        for place, sample in sorted(self._samples.items(), key=lambda item: item[0]):
            verifier = self._verifier.of_row(sample.row)
            source = type(verifier).__name__
            if place in self._verdicts:
                (verdict,) = collect_results(self._pool, [(sample, self._verdicts[place])])
            else:
                with in_this_process(source, sample):
                    columns = verifier.arguments.columns(sample.row)
                    verdict = verifier.verify(sample.prompt, sample.response, sample.answer, **columns)
            (number,) = _finite([verdict], [sample], source)
            self._odd_scores.look_at_verdict(number, source)
            groups.setdefault(place[0], []).append(replace(sample, correct=number))
        return list(groups.values())

    def _term(self, reward: Reward, groups: Sequence[Sequence[Sample]]) -> list[list[float | None]]:
        """The values of a term, a list for each group."""
        source = f"reward {reward.name!r}"
        if reward.response_function is not None:
            calls = self._values[reward.name]
            results = iter(collect_results(self._pool, [(self._samples[p], calls[p]) for p in sorted(calls)]))
            values: list[Sequence[float | None]] = [[next(results) for _ in group] for group in groups]
        else:
            with in_this_process(source):
                values = list(reward.score_groups(groups, self._pool))
        if len(values) != len(groups):
            raise RewardError(f"{source} returned values of {len(values)} groups for {len(groups)}")
        return [_known(of_group, group, source) for of_group, group in zip(values, groups, strict=True)]


class OddScores:
    """Tells once of terms that never apply, of a response to which none does, and of a verdict out of range."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def look_at_verdict(self, verdict: float, source: str) -> None:
        """Look at a verdict; ``source`` names its verifier."""
        if not -_ROUNDING <= verdict <= 1 + _ROUNDING:
            self._tell(
                ("verdict", source),
                f"{source} returned a verdict outside 0 (wrong) to 1 (right), and so are accuracies and rewards that "
                "take it; from 0.5 on a response counts as right",
            )

    def look_at(self, graded: Sequence[GradedGroup]) -> None:
        """Look at a rollout."""
        for name in graded[0].terms if graded else ():
            values = [value for group in graded for value in group.terms[name]]
            if values and all(value is None for value in values):
                self._tell(
                    ("term", name),
                    f"reward {name!r} returned None for all {len(values)} responses of a rollout, so it does not apply "
                    "to them: does the function lack a return?",
                )
        for group in graded:
            for member, sample in enumerate(group.samples):
                if all(values[member] is None for values in group.terms.values()):
                    self._tell(("response", ""), f"no reward applies to a response, which gets 0{question(sample)}")

    def _tell(self, key: tuple[str, str], message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning(message)


def _known(values: Sequence[float | None], samples: Sequence[Sample], source: str) -> list[float | None]:
    """Plain numbers, and ``None`` where a term does not apply."""
    if isinstance(values, str | bytes | Mapping | Set):
        raise RewardError(
            f"{source} returned {type(values).__name__} for {len(samples)} responses: return a list of numbers"
            f"{question(samples[0])}"
        )
    try:
        values = list(values)
    except TypeError:
        values = [values]  # type: ignore[list-item]
    if len(values) != len(samples):
        raise RewardError(
            f"{source} returned {len(values)} values for {len(samples)} responses: return a number for each, or None"
            f"{question(samples[0])}"
        )
    places = [i for i, value in enumerate(values) if value is not None]
    numbers = _finite([values[i] for i in places], [samples[i] for i in places], source)  # type: ignore[misc]
    known: list[float | None] = [None] * len(samples)
    for i, number in zip(places, numbers, strict=True):
        known[i] = number
    return known


def _finite(values: Sequence[float], samples: Sequence[Sample], source: str) -> list[float]:
    """Plain numbers, whatever a verifier or a reward is made of: samples and rewards travel in checkpoints."""
    numbers = []
    for value, sample in zip(values, samples, strict=True):
        try:
            if isinstance(value, str | bytes):  # float() would read it
                raise TypeError(f"it is the text {value[:40]!r}")
            number = float(value)
        except Exception as error:
            raise RewardError(
                f"{source} returned {type(value).__name__}, which is no number: {one_line(error)}{question(sample)}"
            ) from error
        if not math.isfinite(number):
            raise RewardError(
                f"{source} returned {number} for the response {sample.response[:60]!r}: return a finite number"
                f"{question(sample)}"
            )
        numbers.append(number)
    return numbers
