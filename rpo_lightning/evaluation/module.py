"""EvaluationModule: validates, tests and predicts with a policy. The data module's requests have no prefix then.

``RPOModule`` adds training.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import SeedPurpose, derive_seed
from rpo_lightning.core.types import Batch, Group, RolloutRequest, Sample
from rpo_lightning.evaluation.evaluation import Evaluation
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.rollout.engine import Sampling
from rpo_lightning.rollout.policy_module import PolicyModule

# What a prediction's record has of a sample. The row is in the data, under the uid.
_ANSWER_FIELDS = [field.name for field in fields(Sample) if field.name not in ("uid", "row")]


class EvaluationModule(PolicyModule):
    """A policy that answers questions and is measured by its answers.

    Args:
        evaluation: How evaluation answers are sampled.
        **settings: Those of ``PolicyModule``.

    Attributes:
        evaluations: The current or last evaluation, one for each set of questions.
        answered: The groups of the last ``predict`` step.
    """

    def __init__(self, evaluation: EvaluationSettings, **settings: Any) -> None:
        super().__init__(**settings)
        self.evaluation = evaluation
        self.evaluations: list[Evaluation] = []
        self.answered: list[Group] = []

    @property
    def evaluation_sampling(self) -> Sampling:
        """How evaluation answers are sampled: as in training unless ``model.evaluation.sampling`` is given."""
        return self.evaluation.sampling or self.sampling

    @override
    def on_validation_epoch_start(self) -> None:
        self.timer.pause()
        self.evaluations = self._new_evaluations("val")

    @override
    def on_test_epoch_start(self) -> None:
        self.evaluations = self._new_evaluations("test")

    @override
    def validation_step(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(requests, batch_idx, dataloader_idx)

    @override
    def test_step(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(requests, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluations("val")
        self.timer.resume()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluations("test")

    def predict_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> list[dict[str, Any]]:
        """Answer questions; returns a record of each answer with its verdict."""
        self.answered = groups = self._answer(requests, batch_idx)
        self.timer.take()
        return [
            {"uid": g.request.prompt.uid, "sample": i, **{name: getattr(sample, name) for name in _ANSWER_FIELDS}}
            for g in groups
            for i, sample in enumerate(g.samples)
        ]

    def _answer(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> list[Group]:
        require_requests(requests)
        # Every evaluation uses the same seed, so differences come from the policy.
        parts = (batch_idx, dataloader_idx) if dataloader_idx else (batch_idx,)
        seed = derive_seed(SeedPurpose.EVALUATION, self.global_rank, *parts)
        return self.roll_out(requests, self.evaluation.samples, self.evaluation_sampling, seed)

    def _new_evaluations(self, split: str) -> list[Evaluation]:
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", lambda _: [""])(split)
        votes = self.grader.finds_answers
        keeps_answers = self.trainer.state.fn != TrainerFn.FITTING
        return [Evaluation(name, self.evaluation.samples, votes, self.device, keeps_answers) for name in names]

    def _evaluate(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int) -> None:
        before = self.decoded_tokens
        groups = self._answer(requests, batch_idx, dataloader_idx)
        evaluation = self.evaluations[dataloader_idx]
        classes = self.grader.answer_classes([g.samples for g in groups]) if evaluation.votes else None
        seconds = sum(self.timer.take().values())
        evaluation.add(groups, classes)
        rate = (self.decoded_tokens - before) / max(seconds, 1e-9)
        self.log("tokens/s", rate, batch_size=1, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _log_evaluations(self, stage: str) -> None:
        """Log every metric: its mean over sets, and its value for each named set."""
        means = {e.name: e.means() for e in self.evaluations if e.questions}
        if not means:
            return
        first = next(iter(means.values()))
        metrics = {k: sum(m[k] for m in means.values()) / len(means) for k in first}
        metrics |= {f"{name}/{k}": value for name, m in means.items() if name for k, value in m.items()}
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy")


def require_requests(batch: Any) -> None:
    """Check the batch of a step.

    Raises:
        ConfigurationError: It is not a ``Batch`` of requests.
    """
    if not (isinstance(batch, Batch) and len(batch) and isinstance(batch[0], RolloutRequest)):
        raise ConfigurationError(
            "the module needs batches of RolloutRequest, not "
            f"{type(batch).__name__}: give your rows to RPODataModule(train=rows), and that to the trainer"
        )
