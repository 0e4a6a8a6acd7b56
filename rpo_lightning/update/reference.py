"""The reference policy of the KL penalty: the policy before its first update.

A policy with an adapter is its own reference when the adapter is switched off. Other policies need a copy.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from rpo_lightning.policy.lora import has_adapter


class ReferencePolicy(ABC):
    """Provides the model whose log-probs the KL penalty compares with."""

    @abstractmethod
    def __call__(self) -> Any:
        """Return a context manager that yields the model."""

    @property
    def own_models(self) -> list[PreTrainedModel]:
        """Models other than the policy that the strategy must place on the ranks."""
        return []

    def prepare(self, attention: str, device: Any) -> None:  # noqa: B027 (optional)
        """Give the model the policy's attention implementation and device."""


class FrozenCopy(ReferencePolicy):
    """A copy of the starting policy that is never trained.

    Args:
        model: The copy.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    @override
    def own_models(self) -> list[PreTrainedModel]:
        return [self.model]

    @override
    @contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        yield self.model

    @override
    def prepare(self, attention: str, device: Any) -> None:
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        if self.model.device != device:
            self.model.to(device)


class WithoutAdapter(ReferencePolicy):
    """The policy with its adapter switched off.

    Args:
        policy: A PEFT model.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @override
    @contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        with self.policy.disable_adapter():
            yield self.policy


def reference_of(policy: Any) -> ReferencePolicy:
    """The reference of a policy. Call it before the first update, on the whole policy."""
    return WithoutAdapter(policy) if has_adapter(policy) else FrozenCopy(copy.deepcopy(policy))
