"""From requests to scored groups: samples suffixes, decodes responses, grades them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.types import Completion, Group, RolloutRequest, Sample
from rpo_lightning.policy.tokenizer import decode
from rpo_lightning.rewards.grader import Grader
from rpo_lightning.rollout.engine import GenerationRequest, RolloutEngine, Sampling


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    n: int,
    sampling: Sampling,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """Sample ``n`` suffixes for each request; see :meth:`RolloutEngine.generate`."""
    return engine.generate(
        [GenerationRequest((*r.prompt.token_ids, *r.prefix_ids), n, r.max_new_tokens) for r in requests],
        sampling,
        seed,
        on_progress,
    )


def as_samples(
    request: RolloutRequest, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """Decode whole responses, prefix included, for the rewards."""
    return [
        Sample(
            prompt=request.prompt.text,
            response=decode(tokenizer, request.prefix_ids + c.token_ids),
            answer=request.prompt.answer,
            length=len(request.prefix_ids) + len(c.token_ids),
            finished=c.finished,
        )
        for c in completions
    ]


def score(
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[RolloutRequest],
    completions: Sequence[list[Completion]],
    step: int,
) -> list[Group]:
    """Grade whole responses and return a group for each request.

    Args:
        grader: Verifies and rewards the responses.
        tokenizer: Decodes them.
        requests: The requests.
        completions: The completions of each request.
        step: Number of updates that the policy has seen.
    """
    samples = [as_samples(r, cs, tokenizer) for r, cs in zip(requests, completions, strict=True)]
    graded = grader.grade(samples)
    return [
        Group(
            request=request,
            completions=list(suffixes),
            samples=group.samples,
            rewards=group.rewards,
            reward_terms=group.terms,
            step=step,
        )
        for request, suffixes, group in zip(requests, completions, graded, strict=True)
    ]
