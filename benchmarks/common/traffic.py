"""Bytes that the elementwise work of a decoder layer moves a token: norms, gated MLP, rotary embedding, sums, casts.

Counted by running one layer of transformers' on tensors without data: whatever a kernel reads and writes, matrix
products and attention left out. What fused kernels move follows from what they must read and write. The layer runs in
fp32 under bf16 autocast (``bf16-mixed``): residuals and norms are in fp32, the inputs of products in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS = 512
# Operators that do not count: products, attention, and what only makes views or empty tensors.
_OTHER = ("mm", "addmm", "bmm", "scaled_dot_product", "_scaled_dot_product", "empty", "detach", "new_empty")


@dataclass(frozen=True)
class Traffic:
    """Bytes, of a token or a micro-batch: of a forward pass, and of a backward pass."""

    forward: float
    backward: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.forward * times, self.backward * times)

    def training(self, checkpointing: bool) -> float:
        """Bytes of an update; with gradient checkpointing the forward pass is made twice."""
        return self.forward * (2 if checkpointing else 1) + self.backward


@dataclass(frozen=True)
class LayerTraffic:
    """Elementwise bytes of a decoder layer.

    Attributes:
        plain: Bytes a token of each part, as transformers computes it.
        fused: The same with one kernel for a norm, a gate and a rotation each.
        weights: Bytes of a micro-batch, whatever its tokens: weights are cast to bf16, and their gradients are cast
            back and added up.
    """

    plain: dict[str, Traffic]
    fused: dict[str, Traffic]
    weights: Traffic

    @staticmethod
    def total(parts: dict[str, Traffic]) -> Traffic:
        """All parts of a layer."""
        return sum(parts.values(), Traffic(0, 0))


class _Bytes(TorchDispatchMode):
    """Sums up what kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        held = {x.untyped_storage()._cdata for x in inputs}
        is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in held for x in outputs)
        if not is_view and not name.startswith(_OTHER):
            self.count += sum(_size(x) for x in (*inputs, *outputs))
        return result


def _size(x: Tensor) -> int:
    """Bytes of a tensor; what is broadcast is read once."""
    numbers = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= length if stride else 1
    return numbers * x.element_size()


def _traffic(compute: Callable[..., Any], inputs: list[Tensor], weights: list[Tensor]) -> Traffic:
    """Bytes a token of a computation and of its gradients."""
    with torch.autocast("cpu", dtype=torch.bfloat16), _Bytes() as forward:
        outputs = [x for x in tree_leaves(compute(*inputs)) if isinstance(x, Tensor)]
    with _Bytes() as backward:
        torch.autograd.grad(outputs, [*inputs, *weights], [torch.empty_like(x) for x in outputs])
    return Traffic(forward.count / TOKENS, backward.count / TOKENS)


def layer_traffic(policy: Any) -> LayerTraffic:
    """Count a decoder layer of a Llama-like policy, whose weights may be on ``meta``."""
    config = policy.config
    width, gated = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    with FakeTensorMode():
        layer = type(policy.model.layers[0])(config, 0)
        positions = type(policy.model.rotary_emb)(config)(torch.empty(1, TOKENS, width), torch.arange(TOKENS)[None])

        def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(1, TOKENS, *shape, dtype=dtype, requires_grad=True)

        def rotated(q: Tensor, k: Tensor) -> list[Tensor]:
            rotate = layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
            return [x.bfloat16() for x in rotate(q.transpose(1, 2), k.transpose(1, 2), *positions)]

        def gate(a: Tensor, b: Tensor) -> Tensor:
            return layer.mlp.act_fn(a) * b

        def whole(x: Tensor) -> Any:
            return layer(x, attention_mask=None, position_embeddings=positions)

        hidden = tensor(width, dtype=torch.float32)
        norm = _traffic(layer.input_layernorm, [hidden], list(layer.input_layernorm.parameters()))
        query, key = tensor(config.num_attention_heads, size), tensor(config.num_key_value_heads, size)
        plain = {
            "norms": norm * sum(type(m) is type(layer.input_layernorm) for m in layer.children()),
            "gated MLP": _traffic(gate, [tensor(gated), tensor(gated)], []),
            "rotary embedding": _traffic(rotated, [query, key], []),
        }
        numbers = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        everything = _traffic(whole, [hidden], list(layer.parameters()))
    # Of everything, weights are cast from 4 to 2 bytes forward, and their gradients from 2 to 4 backward.
    rest = everything + Traffic(numbers / TOKENS, numbers / TOKENS) * -6 + LayerTraffic.total(plain) * -1
    both = (config.num_attention_heads + config.num_key_value_heads) * size * 2
    fused = {
        "norms": Traffic(2, 3) * (4 * width * 2),  # fp32: input, output; gradient, input, gradient of the input
        "gated MLP": Traffic(3, 5) * (2 * gated),
        "rotary embedding": Traffic(2, 2) * both,
    }
    sums = {"sums and casts": rest}
    # Adding a gradient to what is there reads two numbers and writes one, in fp32.
    return LayerTraffic(plain | sums, fused | sums, weights=Traffic(6, 6 + 12) * numbers)
