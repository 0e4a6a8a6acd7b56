"""Rollouts: from requests to scored groups, and what the logs say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rpo_lightning.engines.base import GenerationRequest, RolloutEngine, Sampling
from rpo_lightning.records import Completion, Group, RolloutRequest, Sample
from rpo_lightning.rewards.grader import Grader


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    samples: int,
    sampling: Sampling,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """Sample suffixes: ``samples`` of them for each request, after prompt and prefix."""
    return engine.generate(
        [GenerationRequest((*r.prompt.token_ids, *r.prefix_ids), samples, r.max_new_tokens) for r in requests],
        sampling,
        seed,
        on_progress,
    )


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def as_samples(
    request: RolloutRequest, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """Decode whole responses, the prefix included, for the rewards."""
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
    """Grade whole responses and make groups of them."""
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


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the logs say about freshly sampled groups.

    ``rollout/decoded_tokens_per_sample`` counts sampled tokens only; ``rollout/response_tokens`` the
    kept prefix too. The zero-variance share is split into groups that are all right, all wrong, and
    equal for another reason.
    """
    count = len(groups)
    members = [(g, c) for g in groups for c in g.completions]
    equal = [g for g in groups if not g.has_variance]
    rewards = [r for g in groups for r in g.rewards]
    mean = sum(rewards) / len(rewards)
    metrics = {
        "reward/mean": mean,
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        "reward/correct_share": sum(g.correct_count for g in groups) / len(members),
        "rollout/decoded_tokens_per_sample": sum(len(c.token_ids) for _, c in members) / len(members),
        "rollout/response_tokens": sum(sum(g.lengths) for g in groups) / len(members),
        "rollout/kept_prefix_tokens": sum(len(g.request.prefix_ids) for g in groups) / count,
        "rollout/full_path_share": sum(not g.request.prefix_ids for g in groups) / count,
        "rollout/truncated_share": sum(not c.finished for _, c in members) / len(members),
        "rollout/zero_variance_share": len(equal) / count,
        "rollout/all_right_share": sum(g.correct_count == len(g.samples) for g in equal) / count,
        "rollout/all_wrong_share": sum(g.correct_count == 0 for g in equal) / count,
    }
    for term in groups[0].reward_terms:
        values = [v for g in groups for v in g.reward_terms[term]]
        metrics[f"reward/{term}"] = sum(values) / len(values)
    return metrics


def rollout_tokens(groups: Sequence[Group]) -> dict[str, int]:
    """Tokens of the phases of a rollout: prompts and prefixes once a group, and what was sampled."""
    return {
        "prefill": sum(len(g.request.prompt.token_ids) + len(g.request.prefix_ids) for g in groups),
        "decode": sum(len(c.token_ids) for g in groups for c in g.completions),
    }
