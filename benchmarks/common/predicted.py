"""Seconds that follow from operations and bytes: GPUs, the shares of their peaks that are assumed, and the update."""

from __future__ import annotations

from dataclasses import dataclass

from common.random_policy import make
from common.traffic import LayerTraffic, Traffic, layer_traffic
from common.work import ModelWork

# Shares of the peak that are assumed, not measured.
PRODUCT_EFFICIENCY, ATTENTION_EFFICIENCY, PREFILL_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.6, 0.4, 0.5, 0.6


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, memory bandwidth and that of PCIe in one direction in bytes/s (vendor's figures)."""

    name: str
    flops: float
    bandwidth: float
    pcie: float = 64e9

    def moving(self, traffic: float) -> float:
        """Seconds to move bytes in its memory."""
        return traffic / (self.bandwidth * BANDWIDTH_EFFICIENCY)


H20, H100, H200 = Gpu("H20", 148e12, 4.0e12), Gpu("H100", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12)


@dataclass(frozen=True)
class Rows:
    """What an update computes of a group: ``contexts`` times ``context`` tokens, and ``group`` suffixes."""

    context: float
    suffix: float
    group: int
    contexts: int

    @property
    def tokens(self) -> float:
        """Tokens of a group."""
        return self.contexts * self.context + self.group * self.suffix

    @property
    def pairs(self) -> float:
        """Query–key pairs of a group."""
        own = self.contexts * self.context**2 / 2 + self.group * self.suffix**2 / 2
        return own + self.group * self.suffix * self.context


@dataclass(frozen=True)
class Update:
    """Predicted seconds of an update."""

    products: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.products + self.attention + self.elementwise


@dataclass(frozen=True)
class Model:
    """A model's work and traffic."""

    name: str
    work: ModelWork
    layers: int
    traffic: LayerTraffic

    @classmethod
    def of(cls, name: str) -> Model:
        """One of the random policies, by name."""
        policy = make(name, "meta")
        return cls(name, ModelWork.of(policy), policy.config.num_hidden_layers, layer_traffic(policy))

    @property
    def weights(self) -> int:
        """Weights that a decoding step reads."""
        return self.work.matrices + self.work.head

    def update(
        self, gpu: Gpu, rows: Rows, groups: float, micro_batches: float, fused: bool = False, checkpointing: bool = True
    ) -> Update:
        """Seconds of an update of ``groups`` groups in ``micro_batches`` passes."""
        passes = 4 if checkpointing else 3  # a backward pass is two forward passes of products
        products = 2 * passes * self.work.matrices * rows.tokens + 6 * self.work.head * rows.group * rows.suffix
        # Flash attention computes the scores again: two and a half forward passes backward.
        attention = (passes + 0.5) * self.work.pair * rows.pairs
        parts = self.traffic.fused if fused else self.traffic.plain
        a_token: Traffic = LayerTraffic.total(parts) * self.layers
        of_tokens = a_token.training(checkpointing) * rows.tokens * groups
        of_weights = self.traffic.weights.training(checkpointing) * self.layers * micro_batches
        return Update(
            products=products * groups / (gpu.flops * PRODUCT_EFFICIENCY),
            attention=attention * groups / (gpu.flops * ATTENTION_EFFICIENCY),
            elementwise=gpu.moving(of_tokens + of_weights),
        )
