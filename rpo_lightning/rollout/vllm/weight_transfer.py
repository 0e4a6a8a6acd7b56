"""What vLLM is given at a sync: the merged weights, or the base's weights once and then only the adapter's.

vLLM reads an adapter from a folder. It is written into the machine's shared memory (``/dev/shm``) if there is room,
else into a temporary folder, and removed as soon as vLLM has read it.

Every sync gives vLLM an adapter of a new name and number, after the one before was removed. The name is part of the
prefix cache's keys, so no key or value of an earlier adapter is found.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.adapter_weights import NO_ADAPTER, adapter_problem, adapter_shape, adapter_weights
from rpo_lightning.policy.weights import checkpoint_weights
from rpo_lightning.rollout.vllm import platform as vllm_platform

Sync = Literal["merged", "adapter"]
SleepLevel = Literal[0, 1, 2]
_SHARED_MEMORY = Path("/dev/shm")


class WeightTransfer(ABC):
    """Gives a running vLLM the policy's weights.

    Attributes:
        request: The adapter that vLLM generates with; ``None`` if it is merged.
        remedy: What to do if vLLM does not take the weights, for messages.
        usual_sleep_level: What vLLM releases on a GPU while the policy trains, unless the user says otherwise.
    """

    request: Any = None
    remedy: str = ""
    usual_sleep_level: SleepLevel = 2

    def require_servable(self, has_adapter: bool) -> None:  # noqa: B027 (optional)
        """Check what is known before the policy is loaded; see ``RolloutEngine.require_servable``."""

    def require_policy(self, policy: PreTrainedModel) -> None:  # noqa: B027 (optional)
        """Check that this policy can be given to vLLM so.

        Raises:
            ConfigurationError: It cannot.
        """

    def options(self, policy: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
        """Options that vLLM must be started with.

        Args:
            policy: The policy.
            settings: The user's options.

        Raises:
            ConfigurationError: vLLM cannot serve this policy so.
        """
        return {}

    def forget(self) -> None:  # noqa: B027 (optional)
        """Note that vLLM stopped or dropped its weights."""

    @abstractmethod
    def load(self, llm: Any, policy: PreTrainedModel) -> int:
        """Give a running vLLM what it lacks. Its prefix cache must be emptied afterwards.

        Returns:
            The bytes of the tensors that it was given.
        """


class MergedTransfer(WeightTransfer):
    """Gives vLLM all weights at every sync, with adapters merged."""

    @override
    def load(self, llm: Any, policy: PreTrainedModel) -> int:
        return _stream(llm, checkpoint_weights(policy))


class AdapterTransfer(WeightTransfer):
    """Gives vLLM the base's weights once, and the adapter at every sync."""

    remedy = "; if vLLM cannot serve adapters of this policy, set model.engine.sync=merged"
    usual_sleep_level = 1  # level 2 drops the base's weights, which a sync does not give again

    def __init__(self) -> None:
        self._holds_base_of: PreTrainedModel | None = None
        self._number = 0

    @override
    def require_servable(self, has_adapter: bool) -> None:
        if not has_adapter:
            raise refused(NO_ADAPTER)

    @override
    def require_policy(self, policy: PreTrainedModel) -> None:
        problem = adapter_problem(policy)
        if problem is not None:
            raise refused(problem)
        vllm_platform.require_adapters()

    @override
    def options(self, policy: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
        rank, layers = adapter_shape(policy)
        ranks = vllm_platform.adapter_ranks()
        largest = settings.get("max_lora_rank", max(ranks))
        if rank > largest:
            raise refused(f"the adapter has rank {rank}, and vLLM serves at most {largest}: lower model.adapter.rank")
        return {
            "enable_lora": True,
            "max_lora_rank": min(r for r in ranks if r >= rank),
            "max_loras": 1,
            "max_cpu_loras": 1,
            # vLLM makes room in these layers only. In the embedding and the output head it would cost the most.
            "lora_target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        }

    @override
    def forget(self) -> None:
        self._holds_base_of = self.request = None

    @override
    def load(self, llm: Any, policy: PreTrainedModel) -> int:
        self.request, size = None, 0
        if self._holds_base_of is not policy:
            self._holds_base_of = None
            size += _stream(llm, checkpoint_weights(policy, merged=False))
            self._holds_base_of = policy
        dtype = vllm_platform.engine_dtype(llm)
        tensors = {name: w.to("cpu", dtype).contiguous() for name, w in adapter_weights(policy)}
        adapter_bytes = sum(w.nbytes for w in tensors.values())
        self._number += 1
        with _memory_folder(adapter_bytes) as name:
            _write_adapter(Path(name), tensors)
            self.request = vllm_platform.load_adapter(llm, self._number, name)
        unserved = vllm_platform.unserved_layers(llm, self._number)
        if unserved:
            raise refused(
                f"vLLM has no layer {unserved[0]} that takes an adapter: leave it out of model.adapter.target_modules"
            )
        return size + adapter_bytes


def transfer_for(sync: Sync) -> WeightTransfer:
    """The transfer that a setting names.

    Raises:
        ConfigurationError: There is none of this name.
    """
    if sync not in get_args(Sync):
        raise ConfigurationError(f"model.engine.sync must be one of {', '.join(get_args(Sync))}; got {sync!r}")
    return AdapterTransfer() if sync == "adapter" else MergedTransfer()


def refused(problem: str) -> ConfigurationError:
    """The error for a policy whose adapter vLLM cannot be given alone."""
    return ConfigurationError(f"model.engine.sync=adapter: {problem}, or set model.engine.sync=merged")


def _stream(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> int:
    """Stream weights into vLLM; returns their bytes."""
    size = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal size
        for name, weight in weights:
            size += weight.nbytes
            yield name, weight

    vllm_platform.load_weights(llm, counted())
    return size


def _memory_folder(size: int) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for ``size`` bytes, in shared memory if that has room for twice as many."""
    is_usable = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    has_room = is_usable and shutil.disk_usage(_SHARED_MEMORY).free > 2 * size
    return tempfile.TemporaryDirectory(prefix="rpo-lightning-adapter-", dir=_SHARED_MEMORY if has_room else None)


def _write_adapter(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write an adapter as PEFT does. Its matrices B are scaled already: alpha / rank is 1."""
    rank = max(w.shape[0] for name, w in tensors.items() if ".lora_A." in name)
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
