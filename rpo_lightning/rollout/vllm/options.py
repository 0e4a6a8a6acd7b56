"""The options that vLLM is started with: the run's, the platform's, and the user's, which win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rpo_lightning.policy.weights import save_architecture
from rpo_lightning.rollout.engine import EngineSetup
from rpo_lightning.rollout.vllm import platform as vllm_platform
from rpo_lightning.rollout.vllm.requests import request_seeds


def start_options(
    policy: PreTrainedModel,
    folder: str,
    setup: EngineSetup,
    tensor_parallel_size: int,
    own: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """All options for vLLM.

    Args:
        policy: The policy, for its architecture. Its weights are given later.
        folder: Where vLLM finds the tokenizer. The architecture is written there.
        setup: Facts about the run.
        tensor_parallel_size: Number of ranks that share one copy of the weights.
        own: What else the engine needs.
        settings: The user's options, which win.
    """
    dtype = setup.dtype or next(policy.parameters()).dtype
    options = {
        "model": save_architecture(policy, Path(folder)),
        "load_format": "dummy",
        "generation_config": "vllm",
        "dtype": str(torch.float32 if dtype == torch.float64 else dtype).removeprefix("torch."),
        "trust_remote_code": setup.trust_remote_code,
        "seed": request_seeds((setup.seed, setup.rank // tensor_parallel_size), 1)[0],
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "disable_log_stats": False,  # metrics() needs the counts of the prefix cache
        **own,
        **vllm_platform.platform_options(settings),
        **vllm_platform.launcher_options(setup, tensor_parallel_size),
    }
    if setup.max_length is not None:
        options["max_model_len"] = setup.max_length
    return options | settings
