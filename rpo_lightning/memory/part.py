"""One thing that takes memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Bytes on each device that something takes, by moment.

    Attributes:
        name: What it is.
        rollout: While responses are generated.
        backward: At the end of a forward pass and in the backward pass of the largest micro-batch.
        step: While the optimizer makes its step.
    """

    name: str
    rollout: float = 0.0
    backward: float = 0.0
    step: float = 0.0

    @classmethod
    def always(cls, name: str, size: float) -> Part:
        """Something that is there all the time."""
        return cls(name, size, size, size)
