"""Where a run is in its training questions: what a checkpoint holds of it, and how a resumed run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from rpo_lightning.core.hashing import short_name, stable_hash
from rpo_lightning.core.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionOrder:
    """Identifies a list of questions.

    Attributes:
        count: How many they are.
        members: Hash of the questions, whatever their order.
        order: Hash of the questions in their order.
    """

    count: int
    members: str
    order: str

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> QuestionOrder:
        """Look at a list of questions."""
        total = sum(stable_hash(prompt.uid) for prompt in prompts) % 2**64
        return cls(len(prompts), f"{total:016x}", short_name("\n".join(prompt.uid for prompt in prompts)))

    def difference(self, now: QuestionOrder) -> str | None:
        """What has changed since, in a sentence; ``None`` if nothing has."""
        if self == now:
            return None
        if self.count != now.count:
            return f"the checkpoint's run had {self.count} training questions, there are {now.count} now"
        if self.members != now.members:
            return f"some of the {now.count} training questions are not those of the checkpoint's run"
        return f"the {now.count} training questions come in another order than in the checkpoint's run"


class TrainingPosition:
    """The data module's part of a checkpoint."""

    def __init__(self) -> None:
        self._loaded: Mapping[str, Any] | None = None
        self._known: tuple[list[Prompt], QuestionOrder] | None = None

    def state_dict(self, questions_per_iteration: int, prompts: list[Prompt]) -> dict[str, Any]:
        """The unit in which the trainer counts its progress, and which questions it trains on."""
        return {"questions": questions_per_iteration, "order": asdict(self._order_of(prompts))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember the state of the checkpoint that training resumes."""
        self._loaded = state

    def adopt(self, trainer: Trainer, questions_per_iteration: int, prompts: list[Prompt]) -> None:
        """Go on where the checkpoint's run stopped, on whatever number of ranks and with whatever batch size.

        Ranks take turns in the shuffled order, so a run has always trained on the first questions of it. If their
        number is not a whole number of today's batches, a few questions come again. Warns if the questions are not
        those of the checkpoint's run.
        """
        state, self._loaded = self._loaded, None
        if state is None:
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.processed * state["questions"]
        if "order" in state:  # earlier releases did not save it
            difference = QuestionOrder(**state["order"]).difference(self._order_of(prompts))
            if difference is not None:
                log.warning(
                    f"{difference}: this epoch goes on after {done} questions of the new order, so some questions come "
                    "twice in it and some not at all"
                )
        moved = progress.processed - done // questions_per_iteration
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress, name, getattr(progress, name) - moved)

    def _order_of(self, prompts: list[Prompt]) -> QuestionOrder:
        if self._known is None or self._known[0] is not prompts:
            self._known = (prompts, QuestionOrder.of(prompts))
        return self._known[1]
