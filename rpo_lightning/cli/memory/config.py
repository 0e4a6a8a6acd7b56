"""Reads the settings of ``fit`` into a ``Plan``, without making a trainer, a policy or an engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rpo_lightning.cli.memory.optimizers import ADAMW, optimizer_state
from rpo_lightning.cli.memory.plan import EnginePlan, Plan, Precision, Sharding
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.rollout.vllm.engine import VLLMEngine
from rpo_lightning.rollout.vllm.weight_transfer import transfer_for

# Used if data.max_prompt_tokens is not set.
ASSUMED_PROMPT_TOKENS = 1024
_STAGES = {1: Sharding.ZERO1, 2: Sharding.ZERO2, 3: Sharding.ZERO3}
_ENGINE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class Run:
    """The settings of a config that decide its memory.

    Attributes:
        policy: Folder or name of the policy.
        adapter: Its adapter, or ``None``.
        plan: All other settings.
        assumptions: Values assumed for what the config leaves open, a sentence each.
    """

    policy: str
    adapter: LoRA | None
    plan: Plan
    assumptions: tuple[str, ...]


def read_run(config: Mapping[str, Any], has_gpu_memory: bool) -> Run:
    """Read a parsed config.

    Args:
        config: The settings of ``fit`` as plain dictionaries, defaults filled in.
        has_gpu_memory: Whether the user gave a GPU's memory. If so, ``accelerator: auto`` means GPU.

    Raises:
        ConfigurationError: A setting's memory cannot be estimated.
    """
    trainer, model, data = config["trainer"], config["model"], config["data"]
    if not isinstance(model["policy"], str):
        raise ConfigurationError(
            "model.policy is a model, whose memory cannot be estimated: give the policy as a folder or a name"
        )
    _require_counts(config)
    assumptions: list[str] = []
    on_gpu = _is_gpu(trainer["accelerator"], has_gpu_memory)
    devices, nodes = _devices(trainer["devices"], on_gpu, assumptions), int(trainer["num_nodes"])
    prompt = data.get("max_prompt_tokens")
    if prompt is None:
        prompt = ASSUMED_PROMPT_TOKENS
        assumptions.append(f"data.max_prompt_tokens is not set: prompts of at most {prompt:,} tokens")
    optimizer = model.get("optimizer")
    states = ADAMW if optimizer is None else optimizer_state(optimizer["class_path"], optimizer.get("init_args"))
    if not states.is_known:
        assumptions.append(f"the states of {states.name} are not known: as for AdamW")
    update = model["update"]
    objective = (model.get("objective") or {}).get("init_args", {})
    plan = Plan(
        devices=devices, nodes=nodes, on_gpu=on_gpu, precision=_precision(trainer["precision"]),
        optimizer=states, micro_batch_tokens=update["micro_batch_tokens"], prompt_tokens=int(prompt),
        response_tokens=model["max_response_tokens"], group_size=model["group_size"],
        shares_prefixes=update["share_prefixes"], has_cache=config.get("cache") is not None,
        temperature=model["sampling"]["temperature"], checkpointing=update["gradient_checkpointing"],
        accumulate_sharded=update["accumulate_sharded"], has_reference=objective.get("beta", 0.0) > 0,
        engine=_engine(model.get("engine"), devices * nodes), **_strategy(trainer["strategy"], devices * nodes),
    )  # fmt: skip
    adapter = model.get("adapter")
    lora = LoRA(**adapter.get("init_args", {})) if adapter else None
    if lora and lora.quantization and plan.sharding in (Sharding.FSDP2, Sharding.ZERO3):
        raise ConfigurationError(
            f"model.adapter.quantization does not work with {plan.sharding.value}, which cannot split quantised "
            "weights: use trainer.strategy=ddp or deepspeed_stage_2, or remove the quantization"
        )
    return Run(model["policy"], lora, plan, tuple(assumptions))


def _require_counts(config: Mapping[str, Any]) -> None:
    """Check what the classes of a run would: none of them is made."""
    for name, least in (
        ("model.group_size", 2), ("model.max_response_tokens", 1), ("model.update.micro_batch_tokens", 1),
        ("data.max_prompt_tokens", 1), ("trainer.num_nodes", 1),
    ):  # fmt: skip
        value: Any = config
        for key in name.split("."):
            value = value[key]
        if value is not None and value < least:
            raise ConfigurationError(f"{name} must be at least {least}, got {value}")


def _is_gpu(accelerator: Any, has_gpu_memory: bool) -> bool:
    if accelerator in ("gpu", "cuda"):
        return True
    return accelerator != "cpu" and (has_gpu_memory or torch.cuda.is_available())


def _devices(devices: Any, on_gpu: bool, assumptions: list[str]) -> int:
    """Number of devices of a node, from a number, a list, or this machine's devices for ``auto``."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices).strip("[] ")
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text not in ("auto", "-1"):
        if not text.isdecimal() or not int(text):
            raise ConfigurationError(f"trainer.devices={text}: give a number from 1 on, a list of devices, or auto")
        return int(text)
    count = max(1, torch.cuda.device_count()) if on_gpu else 1
    assumptions.append(f"trainer.devices is {text}: {count}, as on this machine")
    return count


def _precision(precision: Any) -> Precision:
    text = str(precision or "32-true")
    if text.startswith("64"):
        return Precision.DOUBLE
    if text.startswith("32"):
        return Precision.FULL
    # Lightning reads "16" and "bf16" as mixed.
    return Precision.HALF if text.endswith("-true") else Precision.MIXED


def _engine(engine: Mapping[str, Any] | None, ranks: int) -> EnginePlan:
    arguments = dict((engine or {}).get("init_args") or {})
    if engine is None or not engine["class_path"].endswith(f".{VLLMEngine.__name__}"):
        return EnginePlan(sequences=arguments.get("max_sequences", 128))
    options = arguments.get("options") or {}
    share = options.get("gpu_memory_utilization", arguments.get("gpu_memory_utilization"))
    level, parallel = arguments.get("sleep_level"), arguments.get("tensor_parallel_size") or 1
    if ranks % parallel:
        raise ConfigurationError(
            f"model.engine.tensor_parallel_size={parallel} must divide the number of processes that train, which is "
            f"{ranks}"
        )
    size = _ENGINE_BYTES.get(str(options.get("dtype", arguments.get("dtype"))))
    usual = transfer_for(arguments.get("sync") or "merged").usual_sleep_level
    return EnginePlan(True, 0.5 if share is None else share, usual if level is None else level, parallel, size)


def _strategy(strategy: Any, ranks: int) -> dict[str, Any]:
    """The fields of a plan that the strategy decides. It is given by name, or by class and arguments."""
    if isinstance(strategy, Mapping):
        name = strategy["class_path"].rpartition(".")[2]
        arguments = dict(strategy.get("init_args") or {})
    else:
        name, arguments = str(strategy), {}
    if name == "auto":
        return {"sharding": Sharding.SINGLE if ranks == 1 else Sharding.DDP}
    if name in ("DDPStrategy", "ddp") or name.startswith("ddp_"):
        view = bool((arguments.get("ddp_kwargs") or arguments).get("gradient_as_bucket_view"))
        return {"sharding": Sharding.DDP, "bucket_view": view}
    if name == "SingleDeviceStrategy":
        return {"sharding": Sharding.SINGLE}
    if name == "ModelParallelStrategy":
        return {"sharding": Sharding.FSDP2}
    if name.startswith(("deepspeed", "DeepSpeed")):
        return _deepspeed(name, arguments)
    raise ConfigurationError(
        f"trainer.strategy={name} is not supported: use ddp, ModelParallelStrategy (FSDP2) or deepspeed"
    )


def _deepspeed(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan for DeepSpeed: from Lightning's name or arguments, or from DeepSpeed's own config."""
    digits = [int(part) for part in name.split("_") if part.isdigit()]
    stage = digits[0] if digits else arguments.get("stage", 2)
    offloads = "_offload" in name or bool(arguments.get("offload_optimizer"))
    parameters = ("_offload" in name and stage == 3) or bool(arguments.get("offload_parameters"))
    bucket, overlaps = arguments.get("reduce_bucket_size", 200_000_000), arguments.get("overlap_comm", True)
    own = arguments.get("config") or os.environ.get("PL_DEEPSPEED_CONFIG_PATH")
    if own:
        zero = _deepspeed_config(own).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        parameters = zero.get("offload_param", {}).get("device", "none") != "none"
        bucket, overlaps = zero.get("reduce_bucket_size", 500_000_000), zero.get("overlap_comm", stage == 3)
    if stage not in _STAGES:
        raise ConfigurationError(
            f"trainer.strategy: the memory of DeepSpeed ZeRO stage {stage} cannot be estimated: use stage 1, 2 or 3"
        )
    return {
        "sharding": _STAGES[stage],
        "offloads_optimizer": offloads,
        "offloads_parameters": parameters,
        "bucket_elements": 500_000_000 if bucket == "auto" else int(bucket),
        "overlaps": bool(overlaps),
    }


def _deepspeed_config(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    try:
        read: Mapping[str, Any] = json.loads(Path(str(source)).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"trainer.strategy: {source} is not a readable DeepSpeed config: give a JSON file"
        ) from error
    return read
