"""RPOModule: one iteration of reinforcement fine-tuning per training step.

A step is: generate suffixes → score whole responses → update the policy. GRPO or DAPO on the full
path is the same program with empty prefixes, so nothing here knows whether RPO is on: the data module
pairs prompts with prefixes, and the cache callback takes ``module.groups`` back into the cache.

Optimisation is manual: the number of micro-batches, the normalisation over the whole batch, several
updates per rollout and dynamic sampling are not what ``accumulate_grad_batches`` can express. Hence
``model.update.max_grad_norm`` is a setting of the module, and ``trainer.gradient_clip_val`` is refused by Lightning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.callbacks import (
    LoneExceptionCallback,
    QuestionOutcomesCallback,
    StopSignalsCallback,
    WeightSyncCallback,
    WholeLogsCallback,
)
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.seeds import SeedPurpose, derive_seed, set_generator_states
from rpo_lightning.core.types import Batch, Group, RolloutRequest
from rpo_lightning.evaluation.module import EvaluationModule, require_requests
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.policy.elementwise.choice import ElementwiseKernels
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.parallel.base import GradientAccumulation, Placement
from rpo_lightning.policy.parallel.strategies import accumulation_for
from rpo_lightning.policy.prefix_sharing.flash_choice import FlashAttention
from rpo_lightning.rewards import Grader, GradingPool, MathVerifier, Reward, Verifier
from rpo_lightning.rollout.engine import RolloutEngine, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine
from rpo_lightning.update.advantages import largest_advantage
from rpo_lightning.update.checkpoint import (
    EpochRepair,
    gathered_state,
    require_same_policy,
    restore_state,
    warn_of_rare_checkpoints,
)
from rpo_lightning.update.choices import chosen_advantages, chosen_correction
from rpo_lightning.update.dynamic_sampling import DynamicSampling, GroupBuffer, has_loss
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.metrics import IterationRecord, rollout_metrics, rollout_tokens, term_sums
from rpo_lightning.update.mismatch import MismatchGuard
from rpo_lightning.update.objectives import DAPO, Objective
from rpo_lightning.update.optimizer import make_optimizer, try_optimizer
from rpo_lightning.update.reference import reference_of
from rpo_lightning.update.schedule import LearningRateSchedule
from rpo_lightning.update.settings import UpdateSettings
from rpo_lightning.update.watch import LearningWatch, is_finite

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Term = Reward | Callable[..., Any]
else:
    Term = Reward  # what the command line offers: there a FunctionReward names a function

T = TypeVar("T")


class RPOModule(EvaluationModule):
    """Holds the policy and its loss.

    Args:
        policy: A Hugging Face folder or hub name, ``embedded:arithmetic-reasoner``, or a model.
        rewards: Terms of the reward. A function stands for a ``FunctionReward``.
        tokenizer: The policy's tokenizer, where ``policy`` is a model.
        verifier: Decides what is right; math equivalence if not given.
        objective: The loss; ``DAPO`` if not given.
        engine: Generates rollouts; the transformers engine if not given.
        group_size: Responses per question (G), at least 2.
        max_response_tokens: Limit of a whole response, prefix included.
        stop: Texts and token ids that end a response, in training and evaluation, besides the end-of-sequence tokens of
            tokenizer and generation config.
        sampling: How training rollouts are drawn.
        optimizer: Makes the optimizer from the parameters; AdamW at 1e-6 if not given.
        lr_schedule: Learning-rate schedule over the updates.
        trust_remote_code: Whether Python code that comes with the policy's folder or hub repository may be executed, by
            the tokenizer, the policy and the engine. Without it, a policy that needs such code is refused.
        adapter: Train a low-rank adapter instead of the policy's weights.
        elementwise_kernels: Which kernels compute norms, gated MLPs and rotary embeddings on a GPU: those of ``liger``,
            none but torch's own (``none``), or ``auto``: Liger's if they are installed and agree with the plain layers.
        flash_attention: Which implementation of flash attention computes on a GPU, in this whole process: torch's own
            (``FA2``), or ``FA3`` or ``FA4`` where their packages are installed and pass a trial. If not given, the one
            that is active, which is ``FA2`` unless something else was activated.
        dynamic_sampling: Drop groups without variance and refill; off if not given.
        update: How scored groups become a gradient.
        evaluation: How evaluation answers are drawn.
        grading: The pool of grading processes.
    """

    def __init__(
        self,
        policy: str | PreTrainedModel,
        rewards: list[Term],
        tokenizer: PreTrainedTokenizerBase | None = None,
        verifier: Verifier | None = None,
        objective: Objective | None = None,
        engine: RolloutEngine | None = None,
        group_size: int = 6,
        max_response_tokens: int = 4096,
        stop: list[str | int] | None = None,
        sampling: Sampling = Sampling(),
        optimizer: OptimizerCallable | None = None,
        lr_schedule: LearningRateSchedule = LearningRateSchedule(),
        trust_remote_code: bool = False,
        adapter: LoRA | None = None,
        elementwise_kernels: ElementwiseKernels = "auto",
        flash_attention: FlashAttention | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        update: UpdateSettings = UpdateSettings(),
        evaluation: EvaluationSettings = EvaluationSettings(),
        grading: GradingPool | None = None,
    ) -> None:
        if isinstance(rewards, str) or not isinstance(rewards, Sequence):
            raise ConfigurationError(f"model.rewards is a list of rewards and functions, got {type(rewards).__name__}")
        if not isinstance(group_size, int):
            raise ConfigurationError(f"model.group_size is a whole number, got {group_size}")
        if group_size < 2:
            raise ConfigurationError(
                f"model.group_size must be at least 2, got {group_size} (a group of 1 has no advantage)"
            )
        if max_response_tokens < 1:
            raise ConfigurationError(f"model.max_response_tokens must be at least 1, got {max_response_tokens}")
        if sampling.temperature == 0:
            raise ConfigurationError(
                "model.sampling.temperature=0 samples G times the same response; use a value above 0"
            )
        super().__init__(
            policy=policy,
            tokenizer=tokenizer,
            grader=Grader(verifier or MathVerifier(), rewards, grading or GradingPool()),
            engine=engine or TransformersEngine(),
            max_response_tokens=max_response_tokens,
            stop=stop or (),
            sampling=sampling,
            evaluation=evaluation,
            adapter=adapter,
            elementwise_kernels=elementwise_kernels,
            flash_attention=flash_attention,
            trust_remote_code=trust_remote_code,
        )
        self.automatic_optimization = False
        self.objective = objective or DAPO()
        self.group_size = group_size
        self.optimizer_factory = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-6))
        self.lr_schedule = lr_schedule
        self.update = update
        self.buffer = GroupBuffer(dynamic_sampling, update.mask_truncated) if dynamic_sampling else None
        self._reward_weights = {reward.name: reward.weight for reward in self.grader.rewards}
        self._advantages = chosen_advantages(update, self.objective, self._reward_weights, self.buffer is not None)
        caveat = self.engine.logprob_caveat(sampling)
        self._importance_correction = chosen_correction(update, self.objective, caveat)
        self.guard = MismatchGuard(update.mismatch_bound)
        self.watch = LearningWatch(update.max_idle_iterations, update.max_skipped)
        self.groups: list[Group] = []
        self.record = IterationRecord({}, {}, {}, 0, 0)
        self.iteration = 0
        self._loss: PolicyLoss | None = None
        self._accumulation: GradientAccumulation | None = None
        self._generator_states: dict[str, Any] | None = None
        self._epoch_repair = EpochRepair()

    # -- set-up ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Try the optimizer before the policy is loaded."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            try_optimizer(self.optimizer_factory, self.lr_schedule)

    def prepare_policy(self, placement: Placement) -> list[PreTrainedModel]:
        """Make the loss, and the reference policy where the objective needs one."""
        policy = self.loaded_policy
        reference = reference_of(policy) if self.objective.beta > 0 else None
        if self.update.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self._loss = PolicyLoss(
            policy,
            reference,
            self.objective,
            self.update,
            pad_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
            temperature=self.sampling.temperature,
            importance_correction=self._importance_correction,
            timer=self.timer,
            ranks=self.ranks,
            holds_contexts=placement.holds_contexts,
        )
        return reference.own_models if reference else []

    def configure_callbacks(self) -> list[Callback]:
        """What runs need, unless the trainer has its own: engine weights, ends that can be resumed, outcomes told."""
        there = cast(Any, self.trainer).callbacks
        kinds = (
            WeightSyncCallback,
            LoneExceptionCallback,
            QuestionOutcomesCallback,
            WholeLogsCallback,
            StopSignalsCallback,
        )
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in there)]

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule over the run's updates."""
        optimizer = make_optimizer(
            self.optimizer_factory, (p for p in self.loaded_policy.parameters() if p.requires_grad)
        )
        updates = self.lr_schedule.length(self.trainer, self.update.updates_per_rollout, self.buffer is not None)
        return {"optimizer": optimizer, "lr_scheduler": self.lr_schedule.build(optimizer, updates)}

    def written_tensors(self) -> list[Tensor]:
        """See ``PolicyModule``; with the optimizer's states."""
        optimizers: Any = [] if self._trainer is None else self.trainer.optimizers
        states = [state for optimizer in optimizers for state in getattr(optimizer, "state", {}).values()]
        values = [value for state in states if isinstance(state, dict) for value in state.values()]
        return [*super().written_tensors(), *(value for value in values if isinstance(value, Tensor))]

    def on_fit_start(self) -> None:
        """Choose how gradients are accumulated, and look at the checkpoints' settings."""
        self._accumulation = accumulation_for(self.trainer.strategy, self)
        warn_of_rare_checkpoints(self.trainer, self.update.updates_per_rollout)

    # -- one iteration ---------------------------------------------------------------------------

    def training_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> None:
        """Roll out, score, and update the policy unless dynamic sampling asks for more groups."""
        require_requests(requests)
        assert self._loss is not None
        pool = self.grader.pool
        killed, failed, skipped = pool.killed, pool.failed, self.watch.skipped
        seed = derive_seed(SeedPurpose.TRAINING, self.global_rank, self.iteration)
        self.engine.metrics()  # those of validation are not this iteration's
        self.groups = self.roll_out(requests, self.group_size, self.sampling, seed)
        metrics = rollout_metrics(self.groups) | self.engine.metrics()
        before = dict(self._loss.processed_tokens)
        with self.buffer.unchanged_by_exceptions() if self.buffer else nullcontext():
            batch, surplus, usable = self._collect(self.groups, size=len(requests))
            of_update = self._update(batch, surplus) if self._is_needed_anywhere(batch) else {}
        self.iteration += 1  # not before: a checkpoint of an exception makes this iteration again
        processed = {phase: n - before[phase] for phase, n in self._loss.processed_tokens.items()}
        tokens = rollout_tokens(self.groups) | {p: n for p, n in processed.items() if n or p == "update"}
        responses = sum(len(g.completions) for g in self.groups)
        idle = tokens["decode"] - rollout_tokens(usable)["decode"]
        record = IterationRecord(
            metrics,
            self.timer.take(),
            tokens,
            responses,
            killed=pool.killed - killed,
            skipped=self.watch.skipped - skipped,
            usable_groups=len(usable),
            idle_tokens=idle,
            failed=pool.failed - failed,
            terms=term_sums(self.groups),
        )
        self.record = record.over(self.ranks)
        self._log(of_update, len(requests))
        self.watch.check(self.record, of_update.get("loss/advantage_max"))

    def _log(self, of_update: dict[str, float], size: int) -> None:
        metrics = self.record.logged() | of_update
        seconds = self.record.phase_seconds
        rate = self.record.phase_tokens["decode"] / max(seconds["prefill"] + seconds["decode"], 1e-9)
        self.log("reward/mean", metrics.pop("reward/mean"), prog_bar=True, batch_size=size)
        self.log("rollout/tokens_per_second", rate, prog_bar=True, batch_size=size)
        self.log_dict(metrics, batch_size=size)

    def _is_needed_anywhere(self, batch: list[Group]) -> bool:
        """Whether any rank has groups to train on: then all of them make the update."""
        masked = self.update.mask_truncated
        here = any(has_loss(group, masked) for group in batch)
        if batch and not here:
            log.warning(
                "no response of an iteration is in the loss: all are empty, or unfinished and left out by "
                "model.update.mask_truncated"
            )
        return bool(self.trainer.strategy.reduce_boolean_decision(here, all=False))

    def _collect(self, groups: list[Group], size: int) -> tuple[list[Group], list[Group], list[Group]]:
        """Groups to train on now (none: draw more first), those that wait, and the new ones that are usable."""
        if self.buffer is None:
            learns_from_all, masked = self._advantages.learns_from_equal_rewards, self.update.mask_truncated
            return groups, [], [g for g in groups if (learns_from_all or g.has_variance) and has_loss(g, masked)]
        usable = self.buffer.add(groups)
        self.log("rollout/buffered_groups", float(len(self.buffer.groups)), batch_size=size)
        ready = self.trainer.strategy.reduce_boolean_decision(self.buffer.is_ready(size), all=True)
        if not ready:
            self.buffer.refill()
            return [], [], usable
        return self.buffer.take(size), self.buffer.groups, usable

    def _update(self, groups: list[Group], surplus: list[Group]) -> dict[str, float]:
        """Train on groups; returns the metrics of the last update."""
        assert self._loss is not None
        with self.timer("sync"):
            self.engine.sleep()
        parts = min(self.update.minibatches_per_pass, self.ranks.most(len(groups)))
        advantages = self._advantages.advantages(groups, self._reward_weights, self.ranks)
        of_pass = _split(list(zip(groups, advantages, strict=True)), parts)
        minibatches = of_pass * self.update.passes_per_rollout
        waiting = list(surplus)
        if len(minibatches) > 1:
            waiting += [g for part in of_pass for g in self._loss.computed_groups(*_unzipped(part))]
        if len(minibatches) > 1 or self.buffer is not None:
            with self.timer("old_logprobs"):
                self._loss.store_old_logprobs(waiting)
        metrics: dict[str, float] = {}
        largest = {"loss/advantage_max": largest_advantage(advantages, self.ranks)}
        with self.timer("update"):
            for minibatch in minibatches:
                if self.global_step == self.trainer.max_steps:
                    break  # Lightning looks between iterations only, and the schedule ends here
                metrics = self._step(minibatch) | largest
        return metrics

    def _step(self, minibatch: list[tuple[Group, Tensor]]) -> dict[str, float]:
        """One optimizer step on groups and their advantages, unless their loss or its gradient is not finite."""
        assert self._loss is not None
        assert self._accumulation is not None
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        groups, advantages = _unzipped(minibatch)
        metrics = self._loss.backward(groups, advantages, self._accumulation.backward, self._accumulation.forward)
        teaches = self.objective.learns_from_zero_advantages or largest_advantage(advantages, self.ranks) > 0
        is_usable = is_finite(metrics)
        if is_usable and "mismatch/logprob_mean" in metrics:
            self.guard.check(metrics["mismatch/logprob_mean"], self.global_step, is_usual=teaches)
        norm = self._accumulation.step(optimizer, self.update.max_grad_norm, is_usable)
        scheduler: Any = self.lr_schedulers()
        metrics |= {"loss/grad_norm": norm, "loss/learning_rate": scheduler.get_last_lr()[0]}
        if self.watch.count_update(metrics):
            self.policy_version += 1
            scheduler.step()
        return metrics

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the state dict does not hold, and leave out what does not train."""
        if self.adapter is not None:
            trained = {f"policy.{name}" for name, p in self.loaded_policy.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["rpo"] = gathered_state(self.iteration, self.guard, self.buffer, self.watch, self.ranks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what ``on_save_checkpoint`` added, for whatever number of ranks; evaluation needs none of it."""
        require_same_policy(checkpoint, self.loaded_policy, trained_only=self.adapter is not None)
        self.policy_version += 1  # the policy is about to be another one
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        self._epoch_repair.load(checkpoint["loops"])
        state = checkpoint["rpo"]
        self.iteration = state["iteration"]
        self._generator_states = restore_state(state, self.guard, self.buffer, self.watch, self.ranks)

    def on_train_start(self) -> None:
        """Put data and generators where the checkpoint left them, and start the clock of the first iteration."""
        self.timer.take()
        self._epoch_repair.start(self.trainer.fit_loop)
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "adopt_position"):
            data.adopt_position()
            if self.buffer is not None:
                self.buffer.attach_rows(data.prompts.get("train", []))
        if self._generator_states is not None:
            set_generator_states(self._generator_states)
            self._generator_states = None


def _split(groups: list[T], parts: int) -> list[list[T]]:
    """Split into consecutive lists of nearly equal size, empty ones where there are fewer groups than parts."""
    bounds = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[a:b] for a, b in pairwise(bounds)]


def _unzipped(minibatch: list[tuple[Group, Tensor]]) -> tuple[list[Group], list[Tensor]]:
    """The groups, and the advantages of each."""
    return [group for group, _ in minibatch], [advantages for _, advantages in minibatch]
