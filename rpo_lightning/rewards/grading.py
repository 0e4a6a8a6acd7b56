"""The grading of one rollout: responses are submitted as they end, groups are scored when all have.

What is computed for each response by itself, in a worker process, begins at once: isolated verdicts, and rewards with a
``response_function``. Everything else is computed at the end, in this process. Verdicts come first, since rewards may
look at them. Results, errors and their order do not depend on the order in which responses end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rpo_lightning.core.errors import RewardError, RPOError, one_line
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards.base import Reward, Verifier
from rpo_lightning.rewards.pool import Call, GradingPool
from rpo_lightning.rewards.serving import told

# The place of a response: its group, and its number there.
_Place = tuple[int, int]


@dataclass(frozen=True)
class GradedGroup:
    """Verdicts and rewards of one group.

    Attributes:
        samples: The members with their verdicts.
        rewards: Weighted sum of the terms, one a member.
        terms: Unweighted values of each term.
    """

    samples: list[Sample]
    rewards: list[float]
    terms: dict[str, list[float]]


class Grading:
    """Collects the responses of a rollout and scores its groups. Its workers are started before it takes any.

    Args:
        verifier: Decides what is right.
        rewards: Terms of the total reward.
        pool: Where calls that may hang are made.
    """

    def __init__(self, verifier: Verifier, rewards: Sequence[Reward], pool: GradingPool) -> None:
        self._verifier = verifier
        self._rewards = rewards
        self._pool = pool
        self._samples: dict[_Place, Sample] = {}
        self._verdicts: dict[_Place, Call[float]] = {}
        self._values: dict[str, dict[_Place, Call[float]]] = {r.name: {} for r in rewards if r.response_function}
        if verifier.isolated:
            verifier.prepare()
        if verifier.isolated or self._values:
            pool.start()

    def submit(self, group: int, member: int, sample: Sample) -> None:
        """Take a response, and begin what can be computed for it alone.

        Args:
            group: Number of its group.
            member: Number of the response in the group.
            sample: The response.
        """
        place, arguments = (group, member), (sample.prompt, sample.response, sample.answer)
        self._samples[place] = sample
        if self._verifier.isolated:
            self._verdicts[place] = self._pool.submit(self._verifier.verify, *arguments)
        for reward in self._rewards:
            if reward.response_function is not None:
                self._values[reward.name][place] = self._pool.submit(reward.response_function, *arguments)

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
            totals = [
                sum(reward.weight * of_group[reward.name][member] for reward in self._rewards)
                for member in range(len(group))
            ]
            graded.append(GradedGroup(group, _finite(totals, group, "the weighted sum of model.rewards"), of_group))
        return graded

    def cancel(self) -> None:
        """Give up what was begun and is not done."""
        if self._verdicts or any(self._values.values()):
            self._pool.close()

    def _verified(self) -> list[list[Sample]]:
        """The groups with the verifier's verdicts."""
        places = sorted(self._samples)
        samples = [self._samples[place] for place in places]
        if self._verifier.isolated:
            verdicts = self._pool.collect_numbers([self._verdicts[place] for place in places])
        else:
            with _in_this_process(type(self._verifier).__name__):
                verdicts = [self._verifier.verify(s.prompt, s.response, s.answer) for s in samples]
        groups: dict[int, list[Sample]] = {}
        numbers = _finite(verdicts, samples, type(self._verifier).__name__)
        for (group, _), sample, verdict in zip(places, samples, numbers, strict=True):
            groups.setdefault(group, []).append(replace(sample, correct=verdict))
        return list(groups.values())

    def _term(self, reward: Reward, groups: Sequence[Sequence[Sample]]) -> list[list[float]]:
        """The values of a term, a list for each group."""
        source = f"reward {reward.name!r}"
        if reward.response_function is not None:
            calls = self._values[reward.name]
            numbers = iter(self._pool.collect_numbers([calls[place] for place in sorted(calls)]))
            values = [[next(numbers) for _ in group] for group in groups]
        else:
            with _in_this_process(source):
                values = list(reward.score_groups(groups, self._pool))
        if len(values) != len(groups):
            raise RewardError(f"{source} returned values of {len(values)} groups for {len(groups)}")
        return [_finite(of_group, group, source) for of_group, group in zip(values, groups, strict=True)]


@contextmanager
def _in_this_process(source: str) -> Iterator[None]:
    """Tell what a verifier or a reward raises with its name; ``exit()`` would end the trainer without a word."""
    try:
        yield
    except RPOError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"{source} raised {told(error)}") from error


def _finite(values: Sequence[float], samples: Sequence[Sample], source: str) -> list[float]:
    """Plain numbers, whatever a verifier or a reward is made of: samples and rewards travel in checkpoints."""
    try:
        numbers = [float(value) for value in values]
    except Exception as error:
        raise RewardError(f"{source} returned what is no number: {one_line(error)}") from error
    if len(numbers) != len(samples):
        raise RewardError(
            f"{source} returned {len(numbers)} values for {len(samples)} responses: return one number for each"
        )
    for number, sample in zip(numbers, samples, strict=True):
        if not math.isfinite(number):
            raise RewardError(
                f"{source} returned {number} for the response {sample.response[:60]!r}: return a finite number"
            )
    return numbers
