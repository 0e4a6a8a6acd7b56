"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) through PEFT, on quantised weights too (QLoRA, 2305.14314).

Only the adapter trains. The starting policy is the policy without it, so that the KL penalty's reference is no
second model; the rollout engine is given merged weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from rpo_lightning.core.errors import ConfigurationError, require_modules

Quantization = Literal["4bit", "8bit"]


class LoRA:
    """Settings of an adapter.

    Args:
        rank: Rank of the updates.
        alpha: They are scaled by ``alpha / rank``.
        target_modules: Names of the linear layers that get one, or ``all-linear``.
        dropout: Dropout of the adapter's input. Above 0 members of a group cannot share rows in the update.
        quantization: Hold the frozen weights in 4 bits (NF4) or 8, by bitsandbytes. Products in 8 bits round their
            inputs too, some of them by what else is computed at once, so that a rollout's log-probs and the update's
            differ by some 1e-2 now and then: raise ``model.update.mismatch_bound.jump`` with them.
        options: Anything else that ``peft.LoraConfig`` takes.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: int = 32,
        target_modules: str | list[str] = "all-linear",
        dropout: float = 0.0,
        quantization: Quantization | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if rank < 1 or not 0 <= dropout < 1:
            raise ConfigurationError(
                f"model.adapter needs rank >= 1 and 0 <= dropout < 1; got rank={rank}, dropout={dropout}"
            )
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.dropout = dropout
        self.quantization = quantization
        self.options = options or {}

    def loading_options(self) -> dict[str, Any]:
        """What loading the policy needs to be told, for quantised weights.

        Raises:
            ConfigurationError: bitsandbytes is not installed.
        """
        if self.quantization is None:
            return {}
        require_modules("qlora", "bitsandbytes")
        from transformers import BitsAndBytesConfig

        config = (
            BitsAndBytesConfig(load_in_8bit=True)
            if self.quantization == "8bit"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.get_default_dtype(),
            )
        )
        return {"quantization_config": config, "device_map": {"": torch.get_default_device()}}

    def apply(self, policy: Any) -> Any:
        """Freeze a policy and give it an adapter.

        Raises:
            ConfigurationError: PEFT is not installed, the target modules are not there, or the output head would no
                longer be the embedding where they are tied.
        """
        require_modules("lora", "peft")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.target_modules,
            lora_dropout=self.dropout,
            task_type="CAUSAL_LM",
            **self.options,
        )
        _keep_weights_unpacked(policy)
        try:
            adapted = get_peft_model(policy, config)
        except ValueError as error:
            raise ConfigurationError(f"model.adapter: {str(error).splitlines()[0]}") from error
        _require_tied_weights(policy, self.options)
        return adapted


def _require_tied_weights(policy: Any, options: dict[str, Any]) -> None:
    """Neither engines nor a merged policy could hold a head and an embedding that are no longer one."""
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())
    changed = any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends)
    if changed and policy.config.get_text_config().tie_word_embeddings and not options.get("ensure_weight_tying"):
        raise ConfigurationError(
            "model.adapter changes the embedding or the output head, which this policy ties to one another: leave them "
            "out of target_modules and modules_to_save, or set model.adapter.options.ensure_weight_tying=true"
        )


def _keep_weights_unpacked(policy: Any) -> None:
    """Have bitsandbytes leave 4-bit weights as they are on CPUs with AVX512-BF16.

    There it packs them anew at the first evaluation, for good: scales are rounded to bf16, sizes that are no multiples
    of its blocks fail, and what reads the weights (engine, export) would find another format.
    """
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def has_adapter(policy: Any) -> bool:
    """Whether a policy is a PEFT model."""
    return hasattr(policy, "disable_adapter")
