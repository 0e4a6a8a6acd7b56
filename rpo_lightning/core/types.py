"""The records that travel through one iteration, the glossary, and the legend of tensor shapes.

``Prompt`` → ``RolloutRequest`` (prompt, prefix and suffix budget) → ``Group`` (G scored responses to a request) → loss.
Token ids are kept from end to end. Text is made once, for rewards and logs.

One word a thing:

| word | meaning |
| --- | --- |
| prompt | the question as the policy sees it, chat template included |
| anchor | a cached response, from which prefixes are cut |
| prefix | the tokens of a cached response that a cut keeps; empty on the full path |
| context | prompt + prefix: what all members of a group share |
| suffix | what is sampled after the context |
| completion | a sampled suffix with its log-probs |
| response | prefix + suffix: what is scored and cached |
| group | the G responses to one request |
| member | one response of a group |
| row | what is computed in one line of a forward pass: a response, or a group that shares its context |
| iteration | one ``training_step``: a rollout and the updates made on it |
| update | one optimizer step |

Shape suffixes used throughout the package:

| letter | size |
| --- | --- |
| ``B`` | rows (responses) of a micro-batch |
| ``T`` | tokens of a padded row |
| ``S`` | positions of a row in the loss scope, padded (suffix or response) |
| ``G`` | group size |
| ``V`` | vocabulary |
| ``N`` | sequences being decoded at once |
| ``R`` | requests whose sequences they are |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# At which update the tokens of a response were generated: (step, number of tokens), in order.
Spans = tuple[tuple[int, int], ...]


class Batch(Generic[T]):
    """A batch of records that Lightning leaves alone.

    Lightning searches lists and dataclasses for tensors to move to the device. It rebuilds them on the way and fails
    on frozen dataclasses. These records hold no tensors.
    """

    def __init__(self, items: Sequence[T]) -> None:
        self._items = list(items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> T:
        return self._items[index]


class GoldAnswer(str):
    """A gold answer as text, with the tolerance of its numbers.

    Attributes:
        parts: Its parts. A right answer has all of them; the text joins them by commas.
        tolerances: Absolute tolerance of each part, or one for all; empty means none.
    """

    parts: tuple[str, ...]
    tolerances: tuple[float, ...]

    def __new__(cls, *parts: str, tolerances: tuple[float, ...] = ()) -> GoldAnswer:  # noqa: D102
        answer = super().__new__(cls, ", ".join(parts))
        answer.parts, answer.tolerances = parts, tolerances
        return answer

    def __getnewargs_ex__(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        return self.parts, {"tolerances": self.tolerances}


@dataclass(frozen=True)
class Prompt:
    """A question as the policy sees it.

    Attributes:
        uid: Stable identifier: a content hash, or the value of a column of the data set.
        text: The question before the chat template, for logs and reward functions.
        token_ids: The tokenised prompt, chat template included.
        answer: The gold answer that the verifier compares with, a ``GoldAnswer`` where it was read from data.
        opening: The end of the prompt that belongs to the response: thoughts that the generation prompt opens
            (``<think>``) or leaves empty. Graders read it before the response. Empty for most prompts.
        row: The whole row of data, question and gold answer included, as JSON values. Checkpoints do not hold it.
    """

    uid: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    opening: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class RolloutRequest:
    """Asks the policy to continue a context, i.e. ``prompt + prefix``.

    Attributes:
        prompt: The question.
        prefix_ids: Tokens of the prefix; empty means the full path.
        max_new_tokens: The suffix budget in tokens, at least 1.
        cached_length: Length of the cached response that was cut, 0 where there was none.
        prefix_spans: At which update the prefix's tokens were generated.
        cached_correct: Whether the cached response that was cut is correct; true where there was none.
    """

    prompt: Prompt
    prefix_ids: tuple[int, ...] = ()
    max_new_tokens: int = 1
    cached_length: int = 0
    prefix_spans: Spans = ()
    cached_correct: bool = True

    @property
    def cut(self) -> int:
        """Tokens dropped from the end of the cached response (the paper's m)."""
        return self.cached_length - len(self.prefix_ids)


@dataclass(frozen=True)
class Completion:
    """One sampled suffix.

    Attributes:
        token_ids: The sampled tokens; an end-of-sequence token is the last one if it was sampled.
        logprobs: Log-probability of each token under the (temperature-scaled) policy that sampled it.
        finished: Whether the suffix ended by itself rather than by its budget.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Sample:
    """A whole response as rewards see it.

    Attributes:
        prompt: Question text.
        response: Decoded response, prefix included, after what the prompt opens of it (``Prompt.opening``). Special
            tokens that only frame a text are left out.
        answer: Gold answer.
        length: Response length in tokens, prefix included.
        finished: Whether the response ended by itself.
        correct: The verifier's verdict in [0, 1]; 1 is right.
        uid: Identifier of the question.
        row: The question's row of data; see ``Prompt``.
    """

    prompt: str
    response: str
    answer: str
    length: int
    finished: bool
    correct: float = 0.0
    uid: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_correct(self) -> bool:
        """Whether the verifier accepted the answer."""
        return self.correct >= 0.5


@dataclass
class Group:
    """The G responses to one request, with everything the update and the cache need.

    Attributes:
        request: The request that was answered.
        completions: The G suffixes.
        samples: The G whole responses as rewards saw them, with the verifier's verdicts.
        rewards: The G total rewards.
        reward_terms: Unweighted value of each reward term, G values each; ``None`` where a term does not apply.
        old_logprobs: Per member, the trainer's log-probs under the policy that sampled it, one value a token of the
            loss scope. ``None`` while the group is on-policy: then they equal the current ones.
        step: Number of updates the policy had seen when it sampled the group.
    """

    request: RolloutRequest
    completions: list[Completion]
    samples: list[Sample]
    rewards: list[float]
    reward_terms: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    old_logprobs: list[list[float]] | None = None
    step: int = 0

    @property
    def lengths(self) -> list[int]:
        """Whole response lengths in tokens."""
        return [len(self.request.prefix_ids) + len(c.token_ids) for c in self.completions]

    @property
    def has_variance(self) -> bool:
        """Whether the rewards differ: with most advantages, whether the group carries a gradient."""
        return max(self.rewards) - min(self.rewards) > 1e-6

    @property
    def correct_count(self) -> int:
        """How many members the verifier accepted."""
        return sum(sample.is_correct for sample in self.samples)

    def response_ids(self, member: int) -> tuple[int, ...]:
        """Token ids of a member's whole response, prefix included."""
        return self.request.prefix_ids + self.completions[member].token_ids


def full_path_request(prompt: Prompt, response_limit: int) -> RolloutRequest:
    """A request for a whole response: what GRPO and DAPO ask without RPO."""
    return RolloutRequest(prompt=prompt, max_new_tokens=response_limit)
