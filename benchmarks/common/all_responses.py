"""DAPO's loss whose passes take all responses, as a control."""

from __future__ import annotations

from typing import ClassVar

from rpo_lightning.update.objectives import DAPO


class DAPOOfAllResponses(DAPO):
    """DAPO that does not say that responses without advantage change no gradient, so that they are computed."""

    ignores_zero_advantages: ClassVar[bool] = False
