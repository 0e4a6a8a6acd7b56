"""Rollouts on plain transformers: the engine that runs everywhere.

It decodes with the policy itself and copies no weights. The context of each request is prefilled once; its G samples
read the same keys and values (``sequence_cache.py``). Requests of different lengths share a batch, padded on the left.
Sequences that have ended are removed from the batch. Grouped heads are decoded without copies of their keys and values
(``attention.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.types import Completion
from rpo_lightning.policy.parallel.strategies import whole_parameters
from rpo_lightning.policy.tokenizer import stop_token_ids
from rpo_lightning.policy.weights import underlying_model
from rpo_lightning.rollout.engine import EngineSetup, GenerationRequest, OnFinished, RolloutEngine, Sampling
from rpo_lightning.rollout.transformers.attention import decoding_attention
from rpo_lightning.rollout.transformers.growing_cache import growing_cache
from rpo_lightning.rollout.transformers.sampling import draw
from rpo_lightning.rollout.transformers.sequence_cache import (
    CopiedContexts,
    OneContextEach,
    SequenceCache,
    contexts_can_be_shared,
)
from rpo_lightning.rollout.transformers.stopping import Stopping

# A finished sequence costs time at every step until the batch is rebuilt, and rebuilding copies the cache. Rebuild when
# this share of the sequences has ended.
_REBUILD_SHARE = 0.2


class TransformersEngine(RolloutEngine):
    """Decodes with the policy that is being trained.

    Args:
        max_sequences: Most sequences decoded at once; it bounds the key–value cache. The sequences of one request are
            always decoded together, even if there are more.
    """

    def __init__(self, max_sequences: int = 128) -> None:
        super().__init__()
        if max_sequences < 1:
            raise ConfigurationError(f"model.engine.max_sequences must be at least 1, got {max_sequences}")
        self.max_sequences = max_sequences
        self._policy: PreTrainedModel | None = None
        self._contexts_can_be_shared: bool | None = None
        self._stopping: Stopping | None = None
        self._pad_id = 0
        self._prefill_seconds = 0.0
        self._generate_seconds = 0.0

    def attach(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: EngineSetup = EngineSetup()
    ) -> None:
        """Bind to the policy and learn what ends a sequence.

        Raises:
            ConfigurationError: The policy does not decode with transformers' caches (``past_key_values``), or cannot
                write a text that is to end a sequence.
        """
        model = underlying_model(policy)
        if "past_key_values" not in signature(model.forward).parameters:
            raise ConfigurationError(
                f"model.engine=TransformersEngine decodes with past_key_values, which {type(model).__name__} does not "
                "take: use VLLMEngine"
            )
        if policy is not self._policy:
            self._contexts_can_be_shared = None
        self._policy = policy
        self._stopping = Stopping(stop_token_ids(policy, tokenizer) | setup.stop_ids, setup.stop_strings, tokenizer)
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @override
    def _copy_weights(self, policy: PreTrainedModel) -> None:
        pass  # the engine decodes with the policy itself

    @override
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        if self._policy is None or self._stopping is None or self._weights_version is None:
            raise EngineError("the engine was used before it was attached and synced: call attach and load_weights")
        start, self._prefill_seconds = time.perf_counter(), 0.0
        generator = torch.Generator(device=self._policy.device).manual_seed(seed)
        results: list[list[Completion]] = [[] for _ in requests]
        with _inference(self._policy) as may_share:
            shares = self._shares_contexts if may_share else lambda: False
            for chunk in self._chunks(requests):
                batch = _DecodingBatch(self._policy, self._stopping, self._pad_id, sampling, generator, shares)
                ended: dict[tuple[int, int], Completion] = {}
                for index, member, completion in batch.run([requests[i] for i in chunk]):
                    ended[chunk[index], member] = completion
                    if on_finished is not None:
                        on_finished(chunk[index], member, completion)
                for index, member in sorted(ended):
                    results[index].append(ended[index, member])
                self._prefill_seconds += batch.prefill_seconds
        self._generate_seconds = time.perf_counter() - start
        return results

    @override
    def prefill_share(self) -> float:
        return self._prefill_seconds / self._generate_seconds if self._generate_seconds else 0.0

    def _shares_contexts(self) -> bool:
        """Whether sequences may share a context. Called only if sharing pays; the trial is made once a policy."""
        assert self._policy is not None
        if self._contexts_can_be_shared is None:
            self._contexts_can_be_shared = contexts_can_be_shared(self._policy)
        return self._contexts_can_be_shared

    def _chunks(self, requests: Sequence[GenerationRequest]) -> Iterator[list[int]]:
        """Split requests into batches of similar budget, because a batch lasts as long as its longest suffix."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, len(requests[i].token_ids)))
        chunk: list[int] = []
        sequences = 0
        for index in order:
            if chunk and sequences + requests[index].n > self.max_sequences:
                yield chunk
                chunk, sequences = [], 0
            chunk.append(index)
            sequences += requests[index].n
        if chunk:
            yield chunk


class _DecodingBatch:
    """Decodes one batch of requests, from prefill to the end of its last sequence."""

    def __init__(
        self,
        policy: PreTrainedModel,
        stopping: Stopping,
        pad_id: int,
        sampling: Sampling,
        generator: torch.Generator,
        shares_contexts: Callable[[], bool],
    ) -> None:
        self.policy = policy
        self.device = policy.device
        self.stopping = stopping.to(self.device)
        self.pad_id = pad_id
        self.sampling = sampling
        self.generator = generator
        self.shares_contexts = shares_contexts
        self.prefill_seconds = 0.0

    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, int, Completion]]:
        """Yield every sequence as soon as it ends: the index of its request, its number there, and what was sampled."""
        start = time.perf_counter()
        logits_RV, contexts, mask_RT = self._prefill(requests)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.prefill_seconds = time.perf_counter() - start
        counts = torch.tensor([r.n for r in requests], device=self.device)
        owner_N = torch.repeat_interleave(torch.arange(len(requests), device=self.device), counts)
        budgets_N = torch.tensor([r.max_new_tokens for r in requests], device=self.device)[owner_N]
        cache: SequenceCache
        if OneContextEach.pays(contexts, copies=len(owner_N) - len(requests)) and self.shares_contexts():
            cache = OneContextEach(self.policy, contexts, mask_RT, owner_N)
        else:
            cache = CopiedContexts(contexts, mask_RT, owner_N, longest=int(budgets_N.max()))
        owners, firsts = owner_N.tolist(), (counts.cumsum(0) - counts).tolist()
        for row, completion in self._decode(logits_RV[owner_N], cache, mask_RT.sum(-1)[owner_N], budgets_N):
            yield owners[row], row - firsts[owners[row]], completion

    def _prefill(self, requests: Sequence[GenerationRequest]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Compute every context once: logits of its last position [R, V], its keys and values, and its mask [R, T]."""
        width = max(len(r.token_ids) for r in requests)
        ids_RT = torch.full((len(requests), width), self.pad_id)
        mask_RT = torch.zeros((len(requests), width), dtype=torch.long)
        for row, request in enumerate(requests):
            ids_RT[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask_RT[row, width - len(request.token_ids) :] = 1
        ids_RT, mask_RT = ids_RT.to(self.device), mask_RT.to(self.device)
        cache = growing_cache(self.policy.config)
        output = self.policy(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=(mask_RT.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], cache, mask_RT

    def _decode(
        self, logits_NV: Tensor, cache: SequenceCache, positions_N: Tensor, budgets_N: Tensor
    ) -> Iterator[tuple[int, Completion]]:
        """Sample until all sequences have ended or spent their budgets; yields each that has, with its row."""
        total = len(budgets_N)
        limit = int(budgets_N.max())
        tokens_NT = torch.zeros((total, limit), dtype=torch.long, device=self.device)
        logprobs_NT = torch.zeros((total, limit), dtype=torch.float32, device=self.device)
        rows = torch.arange(total, device=self.device)  # sequences that are in the batch
        live = torch.ones(total, dtype=torch.bool, device=self.device)  # which of these to continue
        remaining = total
        for step in range(limit):
            token_N, logprob_N = draw(logits_NV, self.sampling, self.generator)
            tokens_NT[rows, step] = token_N
            logprobs_NT[rows, step] = logprob_N
            stopped = self.stopping.ended(tokens_NT[rows, max(step + 1 - self.stopping.reach, 0) : step + 1])
            was_live, live = live, live & ~stopped & (budgets_N[rows] > step + 1)
            before, remaining = remaining, int(live.sum())
            if remaining < before:
                over, stop = was_live & ~live, step + 1
                yield from _ended(rows[over], tokens_NT[:, :stop], logprobs_NT[:, :stop], stopped[over])
            if remaining == 0:
                return
            if remaining <= (1 - _REBUILD_SHARE) * len(rows):
                keep = live.nonzero().squeeze(1)
                cache.keep(keep)
                rows, live, token_N, positions_N = rows[keep], live[keep], token_N[keep], positions_N[keep]
            logits_NV = self.policy(
                input_ids=token_N[:, None],
                position_ids=(positions_N + step)[:, None],
                use_cache=True,
                **cache.inputs(),
            ).logits[:, -1]


def _ended(rows: Tensor, tokens_NT: Tensor, logprobs_NT: Tensor, stopped: Tensor) -> Iterator[tuple[int, Completion]]:
    """The rows that have ended, with what was sampled in them."""
    columns = rows.tolist(), tokens_NT[rows].tolist(), logprobs_NT[rows].tolist(), stopped.tolist()
    for row, tokens, logprobs, finished in zip(*columns, strict=True):
        yield row, Completion(tuple(tokens), tuple(logprobs), finished)


@contextmanager
def _inference(policy: PreTrainedModel) -> Iterator[bool]:
    """Within this context the policy is in evaluation mode, without gradients, and with all parameters gathered.

    Ranks decode for different numbers of steps, and therefore cannot gather parameters step by step.

    Yields:
        Whether the policy passed the trial of shared rows; see ``decoding_attention``.
    """
    was_training = policy.training
    policy.eval()
    # Lightning turns autocast's cache off. Without it every decoding step casts all weights again.
    had_cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        with torch.no_grad(), whole_parameters(policy), decoding_attention(policy) as shares_contexts:
            yield shares_contexts
    finally:
        torch.clear_autocast_cache()  # casts made without gradient must not be used with it
        torch.set_autocast_cache_enabled(had_cache)
        policy.train(was_training)
