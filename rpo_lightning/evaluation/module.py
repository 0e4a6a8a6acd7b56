"""PolicyModule: a policy with its rollout engine and its grader, and everything that does not train it.

Evaluation answers questions without a prefix. :class:`~rpo_lightning.module.RPOModule` adds training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import SeedPurpose, derive_seed, run_seed
from rpo_lightning.core.timing import PhaseTimer
from rpo_lightning.core.types import Batch, Group, RolloutRequest
from rpo_lightning.evaluation.evaluation import Evaluation
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.policy.export import export_policy
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.parallel.strategies import placement_for, prepare_strategy
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rewards import Grader
from rpo_lightning.rollout.engine import EngineSetup, RolloutEngine, Sampling
from rpo_lightning.rollout.groups import generate, score

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class PolicyModule(LightningModule):
    """A policy that can answer, be graded and be saved.

    Args:
        policy: A Hugging Face folder or hub name, ``embedded:arithmetic-reasoner``, or a model.
        tokenizer: The policy's tokenizer, where ``policy`` is a model.
        grader: Verifier, rewards and the processes they run in.
        engine: Generates responses.
        max_response_tokens: Limit of a whole response, kept prefix included.
        sampling: How training rollouts are drawn.
        evaluation: How evaluation answers are drawn.
        adapter: A low-rank adapter that is trained instead of the policy's weights.

    Attributes:
        evaluations: What was answered in the current or last evaluation, a set of questions each.
        answered: The groups of the last ``predict`` step.
        decoded_tokens: Tokens sampled so far, for whatever purpose.
    """

    def __init__(
        self,
        policy: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        grader: Grader,
        engine: RolloutEngine,
        max_response_tokens: int,
        sampling: Sampling,
        evaluation: EvaluationSettings,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__()
        if isinstance(policy, str):
            tokenizer = load_tokenizer(policy)
        elif tokenizer is None:
            raise ConfigurationError("model.tokenizer is needed where model.policy is a model rather than a name")
        self.tokenizer = tokenizer
        self.policy: PreTrainedModel | None = None
        self.engine = engine
        self.grader = grader
        self.max_response_tokens = max_response_tokens
        self.sampling = sampling
        self.evaluation = evaluation
        self.adapter = adapter
        # A checkpoint holds what trains: frozen weights are those of the starting policy.
        self.strict_loading = adapter is None
        self.ranks = Ranks()
        self.timer = PhaseTimer()
        self.policy_version = 0
        self.evaluations: list[Evaluation] = []
        self.answered: list[Group] = []
        self.decoded_tokens = 0
        self._policy_source = policy

    def setup(self, stage: str) -> None:
        """Tell the strategy what it has to know before the policy is loaded."""
        prepare_strategy(self._trainer)

    def configure_model(self) -> None:
        """Load the policy, shard it where the strategy does, and introduce the engine to it and to the run."""
        self.ranks.follow(None if self._trainer is None else self._trainer.strategy)
        if self.policy is None:
            placement = placement_for(self._trainer)
            with placement.loading():
                self.policy = self._load()
                others = self.prepare_policy()
            for model in (self.policy, *others):
                placement.place(model)
        self.engine.attach(self.policy, self.tokenizer, self._engine_setup())

    def _load(self) -> PreTrainedModel:
        source, adapter = self._policy_source, self.adapter
        options = adapter.loading_options() if adapter else {}
        policy = load_policy(source, **options) if isinstance(source, str) else source
        return (adapter.apply(policy) if adapter else policy).train()

    @property
    def loaded_policy(self) -> PreTrainedModel:
        """The policy.

        Raises:
            ConfigurationError: It has not been loaded yet.
        """
        if self.policy is None:
            raise ConfigurationError("the policy has not been loaded yet: it is once a trainer has set the module up")
        return self.policy

    def prepare_policy(self) -> list[PreTrainedModel]:
        """Do what has to be done while the policy is whole; returns further models to lay over the ranks."""
        return []

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert, but leave an adapter as precise as it is: in bf16 its small updates would be lost.

        ``precision: bf16-true`` converts the whole module, when a checkpoint's weights have already been restored.
        """
        trained = [p for p in self.parameters() if p.requires_grad] if self.adapter is not None else []
        before = [p.detach().clone() for p in trained]
        module = super().to(*args, **kwargs)
        for parameter, value in zip(trained, before, strict=True):
            # FSDP2 wants parameters of one dtype.
            if parameter.dtype != value.dtype and not isinstance(parameter, DTensor):
                parameter.data = value.to(parameter.device)
        return module

    def _engine_setup(self) -> EngineSetup:
        trainer: Any = self._trainer
        if trainer is None:
            return EngineSetup(seed=run_seed())
        longest = getattr(getattr(trainer, "datamodule", None), "longest_prompt", None)
        return EngineSetup(
            max_length=None if longest is None else longest + self.max_response_tokens,
            dtype=_DTYPES.get(str(trainer.precision).partition("-")[0]),
            seed=run_seed(),
            rank=trainer.global_rank,
            local_rank=trainer.local_rank,
            world_size=trainer.world_size,
        )

    def teardown(self, stage: str) -> None:
        """Stop grading processes and the engine."""
        self.release()

    def release(self) -> None:
        """Stop grading processes and the engine; the next sync starts the engine anew."""
        self.grader.pool.close()
        self.engine.shutdown()

    def roll_out(self, requests: Iterable[RolloutRequest], n: int, sampling: Sampling, seed: int) -> list[Group]:
        """Generate and score ``n`` responses to each request."""
        requests = list(requests)
        self.engine.require_version(self.policy_version)
        with self.timer("decode"):
            completions = generate(self.engine, requests, n, sampling, seed)
        self.timer.move("decode", "prefill", self.engine.prefill_share())
        self.decoded_tokens += sum(len(c.token_ids) for group in completions for c in group)
        with self.timer("reward"):
            return score(self.grader, self.tokenizer, requests, completions, step=self.global_step)

    @property
    def evaluation_sampling(self) -> Sampling:
        """How evaluation answers are drawn: as in training, unless the settings say otherwise."""
        return self.evaluation.sampling or self.sampling

    # -- evaluation: always without a prefix -----------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget earlier answers, and stop the clock of training."""
        self.timer.pause()
        self.evaluations = self._new_evaluations("val")

    def on_test_epoch_start(self) -> None:
        """Forget earlier answers."""
        self.evaluations = self._new_evaluations("test")

    def validation_step(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer validation questions from scratch."""
        self._evaluate(requests, batch_idx, dataloader_idx)

    def test_step(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer test questions from scratch."""
        self._evaluate(requests, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log what came out."""
        self._log_evaluations("val")
        self.timer.resume()

    def on_test_epoch_end(self) -> None:
        """Log what came out."""
        self._log_evaluations("test")

    def predict_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> list[dict[str, Any]]:
        """Answer questions; one record an answer, with its verdict."""
        self.answered = groups = self._answer(requests, batch_idx)
        self.timer.take()
        return [
            {"uid": g.request.prompt.uid, "sample": i, **asdict(sample)}
            for g in groups
            for i, sample in enumerate(g.samples)
        ]

    def _answer(self, requests: Batch[RolloutRequest], batch_idx: int, dataloader_idx: int = 0) -> list[Group]:
        require_requests(requests)
        # The same seed at every evaluation: differences are the policy's.
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
        """Log every metric of every set, and their means over sets where there are several."""
        means = {e.name: e.means() for e in self.evaluations if e.questions}
        if not means:
            return
        first = next(iter(means.values()))
        metrics = {k: sum(m[k] for m in means.values()) / len(means) for k in first}
        metrics |= {f"{name}/{k}": value for name, m in means.items() if name for k, value in m.items()}
        self.log_dict({f"{stage}/{k}": value for k, value in metrics.items()}, prog_bar=len(means) == 1)

    def save_pretrained(self, folder: str | Path, merged: bool = True) -> None:
        """Save the policy as an ordinary Hugging Face folder; all ranks must call it, the first one writes.

        Args:
            folder: Where to. A policy that is there is replaced, other files stay.
            merged: An adapter is merged into the weights; otherwise it is saved alone, as PEFT does.

        Raises:
            ConfigurationError: There is no policy yet, or the folder holds an adapter beside which a whole policy
                would be saved, or the other way round.
        """
        export_policy(self.loaded_policy, self.tokenizer, folder, merged, self.ranks)


def require_requests(batch: Any) -> None:
    """Check what a step was given.

    Raises:
        ConfigurationError: It is not a batch of requests.
    """
    if not (isinstance(batch, Batch) and len(batch) and isinstance(batch[0], RolloutRequest)):
        raise ConfigurationError(
            "the module takes a Batch of RolloutRequest, which RPODataModule makes; give it your rows as "
            "RPODataModule(train=rows)"
        )
