"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) through PEFT, on quantised weights too (QLoRA, 2305.14314).

Only the adapter trains. The policy without its adapter is the starting policy and serves as the KL penalty's reference:
no second model is needed. The rollout engine gets merged weights, or vLLM the adapter alone (``VLLMEngine.sync``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from rpo_lightning.core.errors import ConfigurationError, one_line, require_modules

Quantization = Literal["4bit", "8bit"]


class LoRA:
    """Settings of an adapter.

    Args:
        rank: Rank of the adapter's matrices.
        alpha: The adapter's output is scaled by ``alpha / rank``.
        target_modules: Names of the linear layers that get an adapter, or ``all-linear``.
        dropout: Dropout of the adapter's input. Above 0 the members of a group cannot share rows in the update.
        quantization: Hold the policy's own weights in 4 bits (NF4) or in 8, by bitsandbytes. Products in 8 bits round
            their inputs too, and some of that rounding depends on what else is in the batch. Log-probs of the rollout
            and of the update then differ by about 1e-2 at times: raise ``model.update.mismatch_bound.jump``.
        options: Any other setting of ``peft.LoraConfig``.
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
        if rank < 1 or alpha < 1 or not 0 <= dropout < 1:
            raise ConfigurationError(
                f"model.adapter needs rank >= 1, alpha >= 1 and 0 <= dropout < 1; got rank={rank}, alpha={alpha}, "
                f"dropout={dropout}"
            )
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.dropout = dropout
        self.quantization = quantization
        self.options = options or {}

    def loading_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` that quantise the weights; empty without quantisation.

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
        """Stop a policy's own weights from training and add an adapter.

        Raises:
            ConfigurationError: PEFT is not installed, the policy lacks a target module, or the adapter would untie an
                output head from its embedding.
        """
        require_modules("lora", "peft")
        from peft import LoraConfig, get_peft_model

        try:
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=self.target_modules,
                lora_dropout=self.dropout,
                task_type="CAUSAL_LM",
                **self.options,
            )
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"model.adapter.options: {one_line(error)}; they are settings of peft.LoraConfig"
            ) from error
        _keep_weights_unpacked(policy)
        try:
            adapted = get_peft_model(policy, config)
        except ValueError as error:
            raise ConfigurationError(f"model.adapter: {one_line(error)}") from error
        _require_tied_weights(policy, self.options)
        return adapted


def _require_tied_weights(policy: Any, options: dict[str, Any]) -> None:
    """Refuse an adapter that changes a tied head or embedding alone: engines and merged policies hold one tensor."""
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())
    changed = any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends)
    if changed and policy.config.get_text_config().tie_word_embeddings and not options.get("ensure_weight_tying"):
        raise ConfigurationError(
            "model.adapter changes the embedding or the output head, but this policy ties them together: leave them "
            "out of target_modules and modules_to_save, or set model.adapter.options.ensure_weight_tying=true"
        )


def _keep_weights_unpacked(policy: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights again on CPUs with AVX512-BF16.

    It would do that at the first evaluation and never undo it. Scales are then rounded to bf16, sizes that are no
    multiple of its block size fail, and engine and export find another format.
    """
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def has_adapter(policy: Any) -> bool:
    """Whether a policy is a PEFT model."""
    return hasattr(policy, "disable_adapter")
