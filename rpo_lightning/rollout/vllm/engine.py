"""Rollouts on vLLM, in the trainer's process ("colocated"): one engine per rank.

The engine is built from the policy's *configuration*, never from a checkpoint. Its weights come from syncs only
(``weight_transfer.py``). The context of a group is computed once; its other samples find it in the prefix cache. Every
sync empties that cache.

Every request has its own seed. Samples depend neither on the schedule of requests nor on the content of the prefix
cache, and a resumed run continues like an uninterrupted one.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.types import Completion
from rpo_lightning.policy.tokenizer import stop_token_ids
from rpo_lightning.rollout.engine import EngineSetup, GenerationRequest, OnFinished, RolloutEngine, Sampling
from rpo_lightning.rollout.vllm import platform as vllm_platform
from rpo_lightning.rollout.vllm.options import start_options
from rpo_lightning.rollout.vllm.requests import completion_of, request_seeds, sampling_params
from rpo_lightning.rollout.vllm.tensor_parallel import TensorParallelGroup
from rpo_lightning.rollout.vllm.weight_transfer import SleepLevel, Sync, transfer_for

log = logging.getLogger(__name__)


class VLLMEngine(RolloutEngine):
    """Decodes with vLLM.

    Args:
        dtype: The dtype that the engine computes in; the trainer's if not given.
        max_model_len: Longest prompt plus response in tokens; from the data and ``max_response_tokens`` if not given.
        gpu_memory_utilization: Share of the GPU's memory for weights and key–value cache; 0.5 if not given. On a CPU
            the cache gets 2 GiB instead.
        tensor_parallel_size: Number of ranks that share one copy of the weights.
        enforce_eager: Use no compilation and no CUDA graphs. If not given: false on a GPU, true on a CPU.
        sleep_level: What to release while the policy trains. 0: nothing. 1: the key–value cache, and the weights after
            moving them to the CPU's memory. 2: both, without a copy; a sync follows every update anyway. If not given:
            2 on a GPU, 1 with ``sync="adapter"``, 0 on a CPU.
        sync: What a sync gives vLLM. ``merged``: all weights, with the adapter merged. ``adapter``: the base's weights
            once, after a start or a sleep of level 2, and then only the adapter's, which vLLM adds while it computes.
        options: Any other setting of vLLM's ``EngineArgs``.

    Attributes:
        synced_bytes: Bytes of the tensors that vLLM was given at the last sync.
    """

    def __init__(
        self,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
        sleep_level: SleepLevel | None = None,
        sync: Sync = "merged",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tensor_parallel_size < 1:
            raise ConfigurationError(
                f"model.engine.tensor_parallel_size must be at least 1, got {tensor_parallel_size}"
            )
        settings = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
        }
        self.settings = {k: v for k, v in settings.items() if v is not None} | (options or {})
        self.tensor_parallel_size = tensor_parallel_size
        self.sleep_level = sleep_level
        self.sync = sync
        self.synced_bytes = 0
        self._transfer = transfer_for(sync)
        self._transfer_options: dict[str, Any] = {}
        self._policy: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._setup = EngineSetup()
        self._stop_ids: list[int] = []
        self._llm: Any = None
        self._held: list[Tensor] = []
        self._group = TensorParallelGroup()
        self._owns_process_group = False
        self._used_sleep_level: SleepLevel = 0
        self._asleep = False
        self._seen_cache_tokens = (0, 0)
        self._seen_seconds = (0.0, 0.0)

    # -- life ------------------------------------------------------------------------------------

    @override
    def require_servable(self, has_adapter: bool) -> None:
        self._transfer.require_servable(has_adapter)

    def attach(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: EngineSetup = EngineSetup()
    ) -> None:
        """Remember policy and run. The engine starts at the first sync; it restarts if a stage needs another one.

        Raises:
            ConfigurationError: vLLM is not installed, cannot be imported, or is too old; or this policy cannot be
                synced as ``sync`` says.
        """
        self._transfer.require_policy(policy)
        vllm_platform.import_vllm()  # fails early if it is not installed
        options = self._transfer.options(policy, self.settings)
        self._policy, self._tokenizer = policy, tokenizer
        self._stop_ids = sorted(stop_token_ids(policy, tokenizer) | setup.stop_ids)
        is_longer = (setup.max_length or 0) > (self._setup.max_length or 0)
        has_other_adapter = options != self._transfer_options
        self._setup, self._transfer_options = setup, options
        if has_other_adapter or (is_longer and "max_model_len" not in self.settings):
            self.shutdown()

    def _start(self) -> None:
        assert self._policy is not None
        assert self._tokenizer is not None
        vllm = vllm_platform.import_vllm()
        vllm_platform.require_own_device(self._policy.device, self._setup)
        self._owns_process_group = not torch.distributed.is_initialized()
        self._used_sleep_level = self._supported_sleep_level()
        with tempfile.TemporaryDirectory() as folder, vllm_platform.contained():
            self._tokenizer.save_pretrained(folder)
            own = {"enable_sleep_mode": self._used_sleep_level > 0, **self._transfer_options}
            options = start_options(self._policy, folder, self._setup, self.tensor_parallel_size, own, self.settings)
            log.info(f"starting vLLM {vllm.__version__} in {options['dtype']}")
            vllm_platform.warn_of_slow_dtype(options["dtype"])
            try:
                self._llm = vllm.LLM(**options)
            except Exception as error:
                raise EngineError(
                    f"vLLM {vllm.__version__} did not start: {_cause(error)}{self._transfer.remedy}"
                ) from error
        self._group = TensorParallelGroup.of(self._llm, self.tensor_parallel_size)
        self._seen_cache_tokens = vllm_platform.prefix_cache_tokens(self._llm)
        self._seen_seconds = vllm_platform.request_seconds(self._llm)

    def _supported_sleep_level(self) -> SleepLevel:
        if not vllm_platform.on_cpu():
            wanted = self._transfer.usual_sleep_level if self.sleep_level is None else self.sleep_level
            if wanted and vllm_platform.earlier_engine_holds_memory():
                log.warning(
                    "an earlier vLLM engine of this process still holds memory, and vLLM allows a process one engine "
                    "that can sleep: this one stays awake while the policy trains"
                )
                return 0
            return wanted
        if self.sleep_level:
            log.warning(f"model.engine.sleep_level={self.sleep_level}: vLLM cannot sleep on a CPU and stays awake")
        return 0

    @override
    def shutdown(self) -> None:
        if self._llm is not None:
            llm, self._llm, self._held = self._llm, None, []
            vllm_platform.stop(llm, self._owns_process_group)
        self._transfer.forget()
        self._weights_version = None
        self._asleep = False

    @override
    def sleep(self) -> None:
        if self._llm is None or self._asleep or not self._used_sleep_level:
            return
        self._llm.sleep(level=self._used_sleep_level)
        self._asleep = True
        if self._used_sleep_level == 2:
            self._transfer.forget()
            self._weights_version = None  # level 2 drops the weights: even the same policy must be synced again

    @override
    def wake(self) -> None:
        if self._asleep:
            vllm_platform.wake(self._llm)
            self._asleep = False

    def _copy_weights(self, policy: PreTrainedModel) -> None:
        """Wake up, copy the weights into the engine, and empty its prefix cache."""
        if self._llm is None:
            self._start()
        if self._asleep:
            vllm_platform.wake(self._llm, "weights")
        try:
            self.synced_bytes = self._transfer.load(self._llm, policy)
        except ConfigurationError:
            raise
        except Exception as error:
            log.error("vLLM failed while it loaded the policy's weights", exc_info=True)
            raise EngineError(
                f"vLLM did not load the policy's weights: {_cause(error)}{self._transfer.remedy}"
            ) from error
        if self._asleep:
            vllm_platform.wake(self._llm, "kv_cache")
            self._asleep = False
        self._held = vllm_platform.held_tensors(self._llm)
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not empty its prefix cache: requests are running, sync between calls of generate"
            )

    # -- generation ------------------------------------------------------------------------------

    def logprob_caveat(self, sampling: Sampling) -> str | None:
        """See ``RolloutEngine.logprob_caveat``. vLLM gives log-probs after top-p, top-k and min-p."""
        is_used = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0, "min_p": sampling.min_p > 0}
        used = " and ".join(f"{name}={getattr(sampling, name)}" for name in is_used if is_used[name])
        return (
            f"with {used} vLLM's log-probs are those of the truncated distribution, not the policy's" if used else None
        )

    def metrics(self) -> dict[str, float]:
        """``rollout/prefix_cache_hit_share``: share of prompt tokens found in the prefix cache since the last call.

        ``rollout/synced_bytes``: bytes of the tensors that vLLM was given at the last sync.
        """
        if self._llm is None:
            return {}
        seen, now = self._seen_cache_tokens, vllm_platform.prefix_cache_tokens(self._llm)
        self._seen_cache_tokens = now
        share = (now[1] - seen[1]) / max(now[0] - seen[0], 1)
        return {"rollout/prefix_cache_hit_share": share, "rollout/synced_bytes": float(self.synced_bytes)}

    @override
    def held_tensors(self) -> list[Tensor]:
        return self._held

    def prefill_share(self) -> float:
        """See ``RolloutEngine.prefill_share``. An estimate: vLLM counts time by request, and requests overlap."""
        if self._llm is None:
            return 0.0
        seen, self._seen_seconds = self._seen_seconds, vllm_platform.request_seconds(self._llm)
        prefill, decode = (now - before for now, before in zip(self._seen_seconds, seen, strict=True))
        return prefill / (prefill + decode) if prefill + decode > 0 else 0.0

    @override
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        if self._llm is None or self._weights_version is None or self._asleep:
            raise EngineError("vLLM was used before it was synced with the policy: call load_weights")
        mine = [(r, s) for r, s in zip(requests, request_seeds(seed, len(requests)), strict=True)]
        shared, start = self._group.gather(mine)
        found: dict[tuple[int, int], Completion] = {}
        with vllm_platform.generators_kept(), closing(self._ended(shared, sampling)) as ended:
            for index, member, completion in ended:
                if 0 <= index - start < len(requests):
                    found[index - start, member] = completion
                    if on_finished is not None:
                        on_finished(index - start, member, completion)
        return [[found[index, member] for member in range(request.n)] for index, request in enumerate(requests)]

    def _ended(
        self, requests: Sequence[tuple[GenerationRequest, int]], sampling: Sampling
    ) -> Generator[tuple[int, int, Completion], None, None]:
        """Yield every sequence as soon as it ends: the index of its request, its number there, and what was sampled."""
        # A request for each sequence: vLLM returns those of one request together, when the last of them ends.
        draws = [(i, m) for i, (r, _) in enumerate(requests) for m in range(r.n if sampling.temperature > 0 else 1)]
        try:
            prompts = [{"prompt_token_ids": list(request.token_ids)} for request, _ in requests]
            params = [self._sampling_params(requests[i][0], sampling, requests[i][1] + member) for i, member in draws]
            asked = [prompts[i] for i, _ in draws]
            for number, output in vllm_platform.outputs(self._llm, asked, params, self._transfer.request):
                index, member = draws[number]
                completion = completion_of(output.outputs[0])
                # Greedy samples are equal: vLLM draws one, which is repeated.
                for copy in [member] if sampling.temperature > 0 else range(requests[index][0].n):
                    yield index, copy, completion
        except Exception as error:
            log.error("vLLM failed while it was generating", exc_info=True)
            raise EngineError(f"vLLM failed while it was generating: {_cause(error)}") from error

    def _sampling_params(self, request: GenerationRequest, sampling: Sampling, seed: int) -> Any:
        return sampling_params(request, sampling, self._stop_ids, self._setup.stop_strings, seed)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"
