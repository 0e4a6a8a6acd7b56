"""What vLLM is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rpo_lightning.core.types import Completion
from rpo_lightning.rollout.engine import GenerationRequest, Sampling
from rpo_lightning.rollout.vllm import platform as vllm_platform


def request_seeds(seed: int | tuple[int, ...], count: int) -> list[int]:
    """One seed a request. Its sequences count up from it."""
    return [int(s) for s in np.random.SeedSequence(seed).generate_state(count, np.uint32)]


def sampling_params(
    request: GenerationRequest, sampling: Sampling, stop_ids: Sequence[int], stop_strings: Sequence[str], seed: int
) -> Any:
    """Make the ``SamplingParams`` of a sequence.

    Args:
        request: What is asked for.
        sampling: How tokens are drawn.
        stop_ids: Token ids that end the sequence.
        stop_strings: Texts that end it.
        seed: Its own seed.
    """
    return vllm_platform.import_vllm().SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(stop_ids),
        stop=list(stop_strings),
        seed=seed,
        logprobs=0,  # for the sampled token only
        flat_logprobs=True,
        detokenize=bool(stop_strings),
        skip_special_tokens=False,  # a text may be that of a special token
    )


def completion_of(output: Any) -> Completion:
    """What was sampled."""
    return Completion(tuple(output.token_ids), tuple(output.logprobs.logprobs), output.finish_reason == "stop")
