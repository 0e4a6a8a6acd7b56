"""Counts a model's parameters and widths without loading its weights.

Only the model's configuration is read. The model and its adapter are built on torch's ``meta`` device, where tensors
have shapes but no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.limits import head_size
from rpo_lightning.policy.load import load_configuration, not_loaded
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.parallel.fsdp2 import decoder_layers


@dataclass(frozen=True)
class ModelShape:
    """Counts of numbers, not bytes. Tied parameters count once.

    Attributes:
        name: Architecture.
        trainable: Parameters that train.
        frozen: Parameters that do not train and are not quantised.
        quantized: Parameters that are quantised.
        quantized_rows: Rows of the quantised matrices.
        layers: Decoder layers.
        layer_parameters: Parameters of the largest decoder layer.
        root_parameters: Parameters outside the decoder layers.
        largest: Numbers in the largest trainable parameter.
        vocabulary: Rows of the embedding.
        hidden: Width of the residual stream.
        query: Width of the queries of all heads together.
        key: Width of the keys of all key heads together; the values have the same width.
        heads: Query heads.
        key_heads: Key heads.
        intermediate: Width within the MLP.
        query_norms: Whether queries and keys are normalised.
        adapter_inputs: Sum of the input widths of a layer's adapted matrices; 0 without an adapter.
        adapter_ranks: Sum of the ranks of a layer's adapted matrices; 0 without an adapter.
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
        """Number of all parameters."""
        return self.trainable + self.frozen + self.quantized

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained instead of the policy's weights."""
        return self.adapter_ranks > 0


def model_shape(policy: str, adapter: LoRA | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Count a policy.

    Args:
        policy: A folder, a hub name, or an embedded model, as for ``model.policy``.
        adapter: Its adapter.
        trust_remote_code: Whether Python code that the folder brings may be executed.

    Raises:
        ConfigurationError: No configuration of a causal language model was found, or it lacks layers or widths.
    """
    config = load_configuration(policy, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a bad value of a configuration raises whatever its use raises
        raise not_loaded(policy, "causal language model", error) from error
    return shape_of(model, adapter)


def shape_of(model: Any, adapter: LoRA | None = None) -> ModelShape:
    """Count a model.

    Args:
        model: A transformers model, usually on the ``meta`` device.
        adapter: An adapter to add to it. This changes the model.

    Raises:
        ConfigurationError: The model does not name its decoder layers or their widths.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    head = model.get_output_embeddings()
    quantize = adapter is not None and adapter.quantization is not None
    # Like transformers: all linear layers except the output head.
    quantized = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if quantize else []
    if adapter is not None:
        model = adapter.apply(model)
    layers = decoder_layers(model)
    widths = [getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "intermediate_size")]
    if not layers or not all(isinstance(width, int) for width in widths):
        raise ConfigurationError(
            f"model.policy: {name} does not name its decoder layers or their widths, so its memory cannot be "
            "estimated: use a decoder-only transformers model"
        )
    hidden, heads, intermediate = (int(width) for width in widths if width is not None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = head_size(config)
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
    """Sums of the input widths and of the ranks of a layer's adapted matrices."""
    down = [
        module for name, module in layer.named_modules() if ".lora_A." in f".{name}" and isinstance(module, nn.Linear)
    ]
    return sum(module.in_features for module in down), sum(module.out_features for module in down)
