"""The arguments of ``rpo-lightning plan``."""

from __future__ import annotations

from dataclasses import dataclass, field

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.files import require_place

# Answers to each question, where a group is not larger.
_SAMPLES = 8


@dataclass(frozen=True)
class PlanSettings:
    """How large the sample is, and what is done with it.

    Attributes:
        questions: Training questions in the sample, drawn at random.
        samples: Answers to each of them with each prefix; 8 if not given, or model.group_size if that is more.
        kept_shares: Shares of a correct response to keep as the prefix, each in (0, 1).
        out: A JSON file for the estimates and for all that they were computed from.
    """

    questions: int = 64
    samples: int | None = None
    kept_shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    out: str | None = None

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ConfigurationError(f"--questions must be at least 1, got {self.questions}")
        if self.samples is not None and self.samples < 2:
            raise ConfigurationError(f"--samples must be at least 2 (one answer is right or wrong), got {self.samples}")
        if not all(0 < share < 1 for share in self.kept_shares):
            shares = ", ".join(f"{share:g}" for share in self.kept_shares)
            raise ConfigurationError(f"--kept_shares must lie between 0 and 1, got {shares}")
        if self.out is not None:
            require_place(self.out, "--out")
        object.__setattr__(self, "kept_shares", sorted(set(self.kept_shares)))

    def samples_for(self, group_size: int) -> int:
        """Answers to each question, for groups of this size."""
        return self.samples or max(_SAMPLES, group_size)
