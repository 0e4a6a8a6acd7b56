"""What a rollout engine is: token ids in, token ids and log-probs out.

An engine is attached to a policy, told of every change of its weights, and asked to generate in
between. Engines that hold a copy of the weights (vLLM) copy them in :meth:`~RolloutEngine.load_weights`;
the transformers engine shares them, so that syncing costs nothing. The order of calls is

    ``attach`` → (``load_weights`` or ``wake`` → ``generate``… → ``sleep``) → … → ``shutdown``

The module attaches, generates and lets the engine sleep before it trains;
:class:`~rpo_lightning.callbacks.WeightSyncCallback` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.types import Completion


@dataclass(frozen=True)
class GenerationRequest:
    """Ask for ``n`` continuations of some tokens.

    Attributes:
        token_ids: Prompt and prefix.
        n: How many continuations.
        max_new_tokens: Longest continuation in tokens.
    """

    token_ids: tuple[int, ...]
    n: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(
                f"a suffix budget of {self.max_new_tokens} tokens leaves nothing to generate: it must be at least 1"
            )


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    With ``top_p`` or ``top_k`` in force the sampled distribution is not the policy's, and the
    clipped ratio is biased; both are off by default.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Nucleus share; 1 is off.
        top_k: Keep the k likeliest tokens; 0 is off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigurationError(
                f"sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0; got temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k}"
            )


@dataclass(frozen=True)
class EngineSetup:
    """What an engine knows of the run it serves; its defaults come from here.

    Attributes:
        max_length: Longest prompt plus response in tokens, where it is known.
        dtype: What the trainer computes in; the policy's own if not given.
        seed: Seed of the run.
        rank: Rank of this process among those that train.
        local_rank: The same on its node.
        world_size: Number of processes that train.
    """

    max_length: int | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


class RolloutEngine(ABC):
    """Base class of the rollout engines."""

    def __init__(self) -> None:
        self._weights_version: int | None = None

    @property
    def weights_version(self) -> int | None:
        """Version of the policy whose weights the engine holds; ``None`` before the first sync."""
        return self._weights_version

    @abstractmethod
    def attach(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: EngineSetup = EngineSetup()
    ) -> None:
        """Bind the engine to a policy and a run; called at the start of every stage."""

    def load_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Take over the policy's current weights and remember their ``version``."""
        self._copy_weights(policy)
        self._weights_version = version

    @abstractmethod
    def _copy_weights(self, policy: PreTrainedModel) -> None:
        """Copy the weights into the engine; nothing to do for an engine that shares them."""

    @abstractmethod
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample continuations.

        Args:
            requests: What to continue.
            sampling: How tokens are drawn.
            seed: Same requests, weights and seed give the same completions.
            on_progress: Called with the number of sequences that have just been completed.

        Returns:
            For each request, in order, its ``n`` completions.

        Raises:
            EngineError: The engine is not attached, or has no weights yet.
        """

    def logprob_caveat(self, sampling: Sampling) -> str | None:
        """Why the log-probs of such samples cannot be compared with the policy's; ``None`` if they can."""
        return None

    def metrics(self) -> dict[str, float]:
        """What the engine has to say about the rollouts since the last call, ``rollout/…``."""
        return {}

    @abstractmethod
    def prefill_share(self) -> float:
        """Share of the last :meth:`generate`'s seconds that computing prompts and prefixes took."""

    def sleep(self) -> None:  # noqa: B027 (optional)
        """Release memory while the policy trains; engines that share the weights do nothing."""

    def wake(self) -> None:  # noqa: B027 (optional)
        """Undo :meth:`sleep` where the weights have not changed since."""

    def shutdown(self) -> None:  # noqa: B027 (optional)
        """Release everything; the next :meth:`load_weights` starts anew."""

    def require_version(self, version: int) -> None:
        """Check that the engine is in sync with the policy.

        Raises:
            EngineError: The engine holds the weights of another version.
        """
        if self._weights_version != version:
            raise EngineError(
                f"the rollout engine holds the weights of policy version {self._weights_version}, the policy is at "
                f"{version}: add rpo_lightning.callbacks.WeightSyncCallback to the trainer's callbacks"
            )
