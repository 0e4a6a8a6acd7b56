"""The reference policy of the KL penalty: the starting policy, frozen.

A policy with an adapter *is* its starting policy once the adapter is switched off, so that no second model is held.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from rpo_lightning.policy.lora import has_adapter


class ReferencePolicy(ABC):
    """Provides the model whose log-probs the penalty compares with."""

    @abstractmethod
    def __call__(self) -> Any:
        """Context manager that gives the model."""

    @property
    def own_models(self) -> list[PreTrainedModel]:
        """Models beside the policy that have to be laid over the ranks."""
        return []

    def prepare(self, attention: str, device: Any) -> None:  # noqa: B027 (optional)
        """Have it attend as the policy does, on the policy's device."""


class FrozenCopy(ReferencePolicy):
    """A copy of the starting policy.

    Args:
        model: The copy.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def own_models(self) -> list[PreTrainedModel]:
        """The copy."""
        return [self.model]

    @contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        """The copy."""
        yield self.model

    def prepare(self, attention: str, device: Any) -> None:
        """Have it attend as the policy does, on the policy's device."""
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

    @contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        """The policy without its adapter, while the context lasts."""
        with self.policy.disable_adapter():
            yield self.policy


def reference_of(policy: Any) -> ReferencePolicy:
    """The reference of a policy that has just been loaded."""
    # A copy, not a second load: the starting policy is what was loaded.
    return WithoutAdapter(policy) if has_adapter(policy) else FrozenCopy(copy.deepcopy(policy))
