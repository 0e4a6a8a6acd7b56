"""From requests to scored groups: samples suffixes, decodes responses and has them graded as they end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.types import Completion, Group, RolloutRequest, Sample
from rpo_lightning.policy.tokenizer import Continuations
from rpo_lightning.rewards.grader import Grader
from rpo_lightning.rollout.engine import GenerationRequest, OnFinished, RolloutEngine, Sampling


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    n: int,
    sampling: Sampling,
    seed: int,
    on_finished: OnFinished | None = None,
) -> list[list[Completion]]:
    """Sample ``n`` suffixes for each request; see ``RolloutEngine.generate``."""
    return engine.generate(
        [GenerationRequest((*r.prompt.token_ids, *r.prefix_ids), n, r.max_new_tokens) for r in requests],
        sampling,
        seed,
        on_finished,
    )


class Scoring:
    """Makes scored groups of a rollout's completions. Grading runs beside decoding.

    It is a context: where the rollout in it fails, gradings that have begun are cancelled.

    Args:
        grader: Verifies and rewards the responses.
        tokenizer: Decodes them, each once.
        requests: The requests of the rollout.
        step: Number of updates that the policy has seen.
    """

    def __init__(
        self, grader: Grader, tokenizer: PreTrainedTokenizerBase, requests: Sequence[RolloutRequest], step: int
    ) -> None:
        self._requests = requests
        self._step = step
        self._texts = [Continuations(tokenizer, request.prefix_ids) for request in requests]
        self._submitted: set[tuple[int, int]] = set()
        self._grading = grader.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._grading.cancel()

    def add(self, index: int, member: int, completion: Completion) -> None:
        """Take a completion that has ended, and begin to grade it; an engine's ``on_finished``."""
        request = self._requests[index]
        self._submitted.add((index, member))
        self._grading.submit(
            index,
            member,
            Sample(
                prompt=request.prompt.text,
                response=request.prompt.opening + self._texts[index].text(completion.token_ids),
                answer=request.prompt.answer,
                length=len(request.prefix_ids) + len(completion.token_ids),
                finished=completion.finished,
                uid=request.prompt.uid,
                row=request.prompt.row,
            ),
        )

    def groups(self, completions: Sequence[list[Completion]]) -> list[Group]:
        """Wait for the grading; returns a group for each request.

        Args:
            completions: The completions of each request. Those that were not added before are added now.
        """
        for index, members in enumerate(completions):
            for member, completion in enumerate(members):
                if (index, member) not in self._submitted:
                    self.add(index, member, completion)
        return [
            Group(
                request=request,
                completions=list(suffixes),
                samples=group.samples,
                rewards=group.rewards,
                reward_terms=group.terms,
                step=self._step,
            )
            for request, suffixes, group in zip(self._requests, completions, self._grading.finish(), strict=True)
        ]
