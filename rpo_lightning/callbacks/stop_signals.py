"""Ends a run on SIGTERM, SIGUSR1 or Ctrl-C at a point from which it resumes exactly.

By itself Lightning 2.6 raises ``KeyboardInterrupt`` wherever it is, in the middle of an optimizer's step too. On SLURM
it writes a checkpoint inside the signal's handler, with half an update in it. On several ranks its handler broadcasts
in the middle of other collectives. Without SLURM, SIGUSR1 kills the process.

Here a handler only takes a note. After the update, all ranks agree on whether one of them has a note. Then they write a
checkpoint and end. On SLURM they have the job requeued, as Lightning does, where nothing was trained yet too.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from rpo_lightning.callbacks.after_stop import requeued, slurm_checkpoint, stop_checkpoint, what_is_kept

if TYPE_CHECKING:
    from rpo_lightning.module import RPOModule

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals(_SignalConnector):
    """Handlers that take a note of the first signal. They replace Lightning's while a trainer fits.

    Attributes:
        received: The first signal of this process.
        agreed: The signal that ends the run, once the ranks have agreed on it.
        saved: The checkpoint that holds what the run was at its end; ``None`` if none was written.
        has_trained: Whether an iteration has ended.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received = 0
        self.agreed = 0
        self.saved: Path | None = None
        self.has_trained = False

    @property
    def is_to_be_requeued(self) -> bool:
        """Whether SLURM shall start the job again."""
        return bool(self.agreed) and self.agreed == self.requeue_signal

    @property
    def requeue_signal(self) -> int:
        """The signal after which SLURM shall requeue the job; 0 if it is not to."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return int(environment.requeue_signal or 0)
        return 0

    @override
    def register_signal_handlers(self) -> None:
        self.received_sigterm, self.received, self.agreed = False, 0, 0
        self._original_handlers = self._get_current_signal_handlers()
        for number in {*SIGNALS, self.requeue_signal or signal.SIGUSR1}:
            earlier = signal.getsignal(number)
            if earlier in (signal.SIG_DFL, signal.default_int_handler) or number == signal.SIGTERM:
                self._register_signal(number, self._handler(earlier))

    def save(self) -> None:
        """Write a checkpoint for the run that goes on, where SLURM's or ``--ckpt_path last`` finds it; a collective."""
        write = slurm_checkpoint if self.is_to_be_requeued else stop_checkpoint
        self.saved = write(self.trainer)

    def _handler(self, earlier: Any) -> Any:
        def note(number: int, frame: Any) -> None:
            if number == self.received == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            elif not self.received:
                self.received = number
                if self.trainer.is_global_zero:
                    again = "; another Ctrl-C ends it at once" if number == signal.SIGINT else ""
                    _say(f"{signal.Signals(number).name}: the run ends after this update{again}")
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(number, frame)

        return note


class StopSignalsCallback(Checkpoint):
    """Writes a checkpoint and ends the run after a signal. ``RPOModule`` adds one itself.

    It is a ``Checkpoint``, because Lightning calls those last, when the cache and the others know the update, and have
    written their files after an exception.
    """

    best_model_path = ""  # which Lightning asks the first of the checkpoint callbacks for

    def setup(self, trainer: Trainer, pl_module: RPOModule, stage: str) -> None:
        """Replace Lightning's handlers before it registers them; evaluations that follow get Lightning's again."""
        trainer._signal_connector = StopSignals(trainer) if stage == "fit" else _SignalConnector(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if the run is to end, and have Lightning end it once it has logged the update."""
        signals = _signals(trainer)
        signals.has_trained = True
        if _agrees(trainer, pl_module) and not 0 < trainer.max_steps <= trainer.global_step:
            signals.save()
            signals.received_sigterm = True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: RPOModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The same in the middle of a validation, which the resumed run begins again."""
        if trainer.state.fn != "fit" or trainer.received_sigterm or not _agrees(trainer, pl_module):
            return
        signals = _signals(trainer)
        if not trainer.sanity_checking:
            signals.save()
        signals.received_sigterm = True

    def on_exception(self, trainer: Trainer, pl_module: RPOModule, exception: BaseException) -> None:
        """Have SLURM requeue the job, say how to go on, and give the process the exit code of its signal."""
        signals = trainer._signal_connector
        if not (isinstance(exception, SIGTERMException) and isinstance(signals, StopSignals) and signals.agreed):
            return
        # Lightning kills the first rank when a process that it started ends with another code than 0.
        is_started_by_lightning = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
        exception.code = 0 if is_started_by_lightning and trainer.local_rank else 128 + signals.agreed
        kept = what_is_kept(trainer, signals.saved, signals.has_trained)
        if trainer.is_global_zero:
            how = kept.how_to_go_on
            if signals.is_to_be_requeued and (kept.by_slurm or not signals.has_trained):
                how = requeued() or how
            name = signal.Signals(signals.agreed).name
            log.warning(f"{name}: the run ended after update {trainer.global_step} ({kept.what}): {how}")


def stop_between_batches(trainer: Trainer) -> None:
    """End the run if a signal has arrived, where there is no update to finish; a collective.

    Raises:
        SIGTERMException: One has arrived at any rank.
    """
    if _agrees(trainer, trainer.lightning_module):
        signals = _signals(trainer)
        if signals.is_to_be_requeued:
            signals.save()
        raise SIGTERMException


def _signals(trainer: Trainer) -> StopSignals:
    assert isinstance(trainer._signal_connector, StopSignals)
    return trainer._signal_connector


def _agrees(trainer: Trainer, module: Any) -> bool:
    """Whether any rank has received a signal; a collective."""
    signals = trainer._signal_connector
    if not isinstance(signals, StopSignals):
        return False
    signals.agreed = signals.agreed or module.ranks.most(int(signals.received))
    return bool(signals.agreed)


def _say(line: str) -> None:
    """Print a line from a signal's handler, which may have interrupted another print."""
    os.write(2, f"\n{line}\n".encode())
