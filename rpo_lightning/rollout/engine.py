"""The interface of rollout engines: token ids in, token ids and log-probs out.

An engine is attached to a policy and gets the policy's weights after every change. vLLM copies them in
``load_weights``. The transformers engine shares them, and syncing costs nothing. The order of calls:

    ``attach`` → (``load_weights`` or ``wake`` → ``generate``… → ``sleep``) → … → ``shutdown``

The module calls ``attach`` and ``generate``, and ``sleep`` before it trains.
``WeightSyncCallback`` makes the other calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.types import Completion

# Called when a sequence ends: with the index of its request, its number among the request's ``n``, and what was
# sampled. An engine calls it once for each sequence, in any order, before ``generate`` returns.
OnFinished = Callable[[int, int, Completion], None]


@dataclass(frozen=True)
class GenerationRequest:
    """Asks for ``n`` suffixes of a context.

    Attributes:
        token_ids: The context: prompt and prefix.
        n: Number of suffixes to sample.
        max_new_tokens: The suffix budget in tokens, at least 1.
    """

    token_ids: tuple[int, ...]
    n: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(
                f"a suffix budget of {self.max_new_tokens} tokens leaves nothing to generate: make it at least 1"
            )


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    ``top_p``, ``top_k`` and ``min_p`` sample from another distribution than the policy's, which biases the clipped
    ratio. They are off by default.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Sample from the likeliest tokens that together have this probability; 1 is off.
        top_k: Sample from the k likeliest tokens; 0 is off.
        min_p: Sample from the tokens that are at least this share as likely as the likeliest; 0 is off.
        repetition_penalty: 1, which is off. Other values are refused: a penalty makes a token's log-prob depend on
            which tokens came before, and the update would not compute that.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_p <= 1:
            raise ConfigurationError(f"sampling needs 0 <= min_p <= 1, got min_p={self.min_p}")
        if self.repetition_penalty != 1:
            raise ConfigurationError(
                f"repetition_penalty={self.repetition_penalty} is refused: sampled tokens would have log-probs that no "
                "update computes, so ratios would mean nothing: leave it at 1, and give repetition a negative reward"
            )
        if not math.isfinite(self.temperature):
            raise ConfigurationError(f"sampling.temperature must be a finite number, got {self.temperature}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigurationError(
                f"sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0: got temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k}"
            )


@dataclass(frozen=True)
class EngineSetup:
    """Facts about the run; an engine takes its defaults from them.

    Attributes:
        max_length: Longest prompt plus response in tokens; ``None`` if unknown.
        dtype: The dtype that the trainer computes in; the policy's own if not given.
        seed: Seed of the run.
        rank: Rank of this process among all that train.
        local_rank: Rank of this process among those of its node.
        world_size: Number of processes that train.
        stop: What ends a response besides the end-of-sequence tokens: token ids, and texts. A text is part of the
            response that it ends, and is looked for in what is sampled, never in the context.
        trust_remote_code: Whether Python code that comes with the policy may be executed.
    """

    max_length: int | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    stop: tuple[str | int, ...] = ()
    trust_remote_code: bool = False

    @property
    def stop_ids(self) -> set[int]:
        """Token ids in ``stop``."""
        return {part for part in self.stop if isinstance(part, int)}

    @property
    def stop_strings(self) -> list[str]:
        """Texts in ``stop``."""
        return [part for part in self.stop if isinstance(part, str)]


class RolloutEngine(ABC):
    """Samples suffixes from a policy. Base class of all engines."""

    def __init__(self) -> None:
        self._weights_version: int | None = None

    @property
    def weights_version(self) -> int | None:
        """Version of the weights that the engine holds; ``None`` before the first sync."""
        return self._weights_version

    def require_servable(self, has_adapter: bool) -> None:  # noqa: B027 (optional)
        """Check what is known before the policy is loaded.

        Args:
            has_adapter: Whether the policy has an adapter.

        Raises:
            ConfigurationError: The engine cannot serve such a policy with its settings.
        """

    @abstractmethod
    def attach(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: EngineSetup = EngineSetup()
    ) -> None:
        """Bind the engine to a policy and a run. Called at the start of every stage (fit, validate, test)."""

    def load_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Copy the policy's current weights, unless the engine shares them, and remember their ``version``.

        An engine whose copy failed has no version: it generates nothing until the next one.
        """
        self._weights_version = None
        self._copy_weights(policy)
        self._weights_version = version

    @abstractmethod
    def _copy_weights(self, policy: PreTrainedModel) -> None:
        """Copy the weights into the engine. An engine that shares them does nothing."""

    @abstractmethod
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Sample suffixes.

        Args:
            requests: The contexts, and how many suffixes of what length to sample.
            sampling: How tokens are drawn.
            seed: The same requests, weights and seed give the same completions.
            on_finished: Called with every sequence as soon as it ends. What it raises is raised as it is.

        Returns:
            The ``n`` completions of each request, in the order of the requests.

        Raises:
            EngineError: The engine is not attached, has no weights, or fails.
        """

    def logprob_caveat(self, sampling: Sampling) -> str | None:
        """Why log-probs under this sampling cannot be compared with the policy's; ``None`` if they can."""
        return None

    def metrics(self) -> dict[str, float]:
        """Metrics of the rollouts since the last call, named ``rollout/…``."""
        return {}

    def held_tensors(self) -> list[Tensor]:
        """Tensors that the engine holds beside the policy's, such as weights of its own and a key–value cache."""
        return []

    @abstractmethod
    def prefill_share(self) -> float:
        """Share of the last ``generate``'s time that was spent on contexts, in [0, 1]."""

    def sleep(self) -> None:  # noqa: B027 (optional)
        """Release memory while the policy trains. Engines that share the weights do nothing."""

    def wake(self) -> None:  # noqa: B027 (optional)
        """Undo ``sleep`` if the weights have not changed since then."""

    def shutdown(self) -> None:  # noqa: B027 (optional)
        """Release everything. The next ``load_weights`` starts the engine again."""

    def require_version(self, version: int) -> None:
        """Check that the engine is in sync with the policy.

        Raises:
            EngineError: The engine holds another version of the weights.
        """
        if self._weights_version != version:
            raise EngineError(
                f"the rollout engine holds version {self._weights_version} of the weights, but the policy is at "
                f"version {version}: add rpo_lightning.callbacks.WeightSyncCallback to the trainer's callbacks"
            )
