"""A context that is computed once for several passes.

A group that does not fit into a micro-batch is spread over several passes. Instead of computing its context in each of
them, a first pass computes it and keeps its keys and values. The passes continue these: they are leaves of their
graphs, and collect gradients. A last pass hands the sum of these gradients to the context's own graph. The gradient is
that of one pass (arXiv 2606.01143 and 2602.00482 train on trees in the same way).

The activations of the context are kept meanwhile. A pass with its context takes the memory of a row with both.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpo_lightning.policy.output_head import scoring
from rpo_lightning.policy.prefix_sharing.attention import DetachedContexts
from rpo_lightning.policy.prefix_sharing.layout import BatchLayout
from rpo_lightning.policy.prefix_sharing.rows import Row, SharedRow


class HeldContext:
    """Keys and values of one context.

    The last token of the context is not part of it: every pass computes that, because it predicts the first token of
    every suffix.

    Args:
        context_ids: Prompt and prefix, at least two tokens.
        gradient: Whether the gradient goes through the context.
    """

    def __init__(self, context_ids: tuple[int, ...], gradient: bool) -> None:
        self.ids = context_ids[:-1]
        self.gradient = gradient
        self._computed: DetachedContexts | None = None
        self._leaves: DetachedContexts | None = None
        self._sums: dict[tuple[int, int], Tensor] = {}  # by layer, of its keys (0) and values (1)

    def leaves(self, model: PreTrainedModel, device: torch.device) -> DetachedContexts:
        """The keys and values that a pass continues. They are computed for the first pass.

        Args:
            model: The policy or the reference, the same for all passes.
            device: Where the model is.
        """
        if self._computed is None:
            with nullcontext() if self.gradient else torch.no_grad():
                self._computed = contexts_of(model, [self.ids], device)
        # In 16 bits a sum over many passes would lose small gradients: every pass has leaves of its own.
        self._collect()
        self._leaves = DetachedContexts(
            {
                layer: (k.detach().requires_grad_(self.gradient), v.detach().requires_grad_(self.gradient))
                for layer, (k, v) in self._computed.items()
            }
        )
        return self._leaves

    def loss(self) -> Tensor:
        """A loss whose gradient is that of the context, after the backward passes of all that continue it.

        Its value means nothing. The context is released.
        """
        assert self._computed is not None
        self._collect()
        products = [(self._computed[layer][i].to(x.dtype) * x).sum() for (layer, i), x in self._sums.items()]
        self._computed = self._leaves = None
        self._sums = {}
        return torch.stack(products).sum()

    def _collect(self) -> None:
        """Add the gradients of the last pass, in fp32 or better."""
        for layer, both in (self._leaves or {}).items():
            for i, leaf in enumerate(both):
                if leaf.grad is None:
                    continue
                if (layer, i) in self._sums:
                    self._sums[layer, i] += leaf.grad
                else:
                    self._sums[layer, i] = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))
        self._leaves = None


def contexts_of(model: PreTrainedModel, contexts: list[tuple[int, ...]], device: torch.device) -> DetachedContexts:
    """Keys and values of contexts, computed together; with gradient where torch records one."""
    rows = [SharedRow((Row(0, 0, ids, (), 0),)) for ids in contexts]
    layout, computed = BatchLayout(rows, pad_id=0, concatenated=True), DetachedContexts()  # nothing is padded
    inputs, nothing, _ = layout.inputs(device, model.config._attn_implementation, 1.0)
    with scoring(model, nothing):  # without targets the head computes nothing
        model(**inputs, store_into=computed)
    return computed
