"""What a model consists of, counted on a model without storage.

Only the model's configuration is read: the model is built on torch's ``meta`` device, where tensors have a
shape and nothing else, and gets its adapter there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.load import resolve_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.parallel.fsdp2 import decoder_layers


@dataclass(frozen=True)
class ModelShape:
    """Counts of numbers (not bytes); tied parameters count once.

    Attributes:
        name: Architecture.
        trainable: Parameters that train.
        frozen: Parameters that do not and are held as they are.
        quantized: Parameters that are held quantised.
        quantized_rows: Rows of the quantised matrices.
        layers: Decoder layers.
        layer_parameters: All parameters of the largest decoder layer.
        root_parameters: All parameters outside the decoder layers.
        largest: The largest trainable parameter.
        vocabulary: Tokens.
        hidden: Width of the residual stream.
        query: Width of the queries of all heads.
        key: Width of the keys of all their heads; values are as wide.
        heads: Query heads.
        key_heads: Key heads.
        intermediate: Width within the MLP.
        query_norms: Whether queries and keys are normalised.
        adapter_inputs: Input widths of a layer's adapted matrices, added up; 0 without an adapter.
        adapter_ranks: Ranks of a layer's adapted matrices, added up.
    """

    name: str
    trainable: int
    frozen: int
    quantized: int
    quantized_rows: int
    layers: int
    layer_parameters: int
    root_parameters: int
    largest: int
    vocabulary: int
    hidden: int
    query: int
    key: int
    heads: int
    key_heads: int
    intermediate: int
    query_norms: bool = False
    adapter_inputs: int = 0
    adapter_ranks: int = 0

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen + self.quantized

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter trains rather than the policy."""
        return self.adapter_ranks > 0


def model_shape(policy: str, adapter: LoRA | None = None) -> ModelShape:
    """Count a policy.

    Args:
        policy: A folder, a hub name, or an embedded model, as for ``model.policy``.
        adapter: Its adapter.

    Raises:
        ConfigurationError: There is no configuration of a causal language model at that place.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_policy(policy))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model.policy={policy}: no configuration of a causal language model found there (neither a folder nor a "
            "reachable hub name)"
        ) from error
    return shape_of(model, adapter)


def shape_of(model: Any, adapter: LoRA | None = None) -> ModelShape:
    """Count a model; an adapter is put into it.

    Raises:
        ConfigurationError: The model says neither what its layers are nor how wide.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    head = model.get_output_embeddings()
    quantize = adapter is not None and adapter.quantization is not None
    # As transformers does it: every linear layer but the output head.
    quantized = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if quantize else []
    if adapter is not None:
        model = adapter.apply(model)
    layers = decoder_layers(model)
    widths = [getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "intermediate_size")]
    if not layers or not all(isinstance(width, int) for width in widths):
        raise ConfigurationError(
            f"{name} does not say what its decoder layers are, or how wide: its memory cannot be estimated"
        )
    hidden, heads, intermediate = (int(width) for width in widths if width is not None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // heads
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    total, held = sum(p.numel() for p in model.parameters()), sum(w.numel() for w in quantized)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    inputs, ranks = _adapter_widths(layers[0])
    return ModelShape(
        name, sum(trainable), total - sum(trainable) - held, held, sum(w.shape[0] for w in quantized),
        len(layers), max(per_layer), total - sum(per_layer), max(trainable),
        config.vocab_size, hidden, heads * size, key_heads * size, heads, key_heads, intermediate,
        any(key.rpartition(".")[2] == "q_norm" for key, _ in layers[0].named_modules()), inputs, ranks,
    )  # fmt: skip


def _adapter_widths(layer: nn.Module) -> tuple[int, int]:
    """Input widths and ranks of a layer's adapted matrices, each added up."""
    down = [
        module for name, module in layer.named_modules() if ".lora_A." in f".{name}" and isinstance(module, nn.Linear)
    ]
    return sum(module.in_features for module in down), sum(module.out_features for module in down)
