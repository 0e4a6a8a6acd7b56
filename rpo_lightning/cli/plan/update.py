"""Times the update of a plan: forward and backward passes on sampled groups, without an optimizer step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from rpo_lightning.cli.plan.arms import first_members
from rpo_lightning.cli.plan.estimates import UpdateSeconds
from rpo_lightning.core.types import Group
from rpo_lightning.module import RPOModule
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss

# Groups whose passes are timed. More take longer and change little: an iteration is a multiple of them.
TIMED_GROUPS = 8


def can_time(module: RPOModule) -> bool:
    """Whether the update can be timed: other strategies set their gradients up for a training run only."""
    return isinstance(module.trainer.strategy, SingleDeviceStrategy)


def seconds_per_response(module: RPOModule, loss: PolicyLoss, groups: Sequence[Group]) -> UpdateSeconds:
    """Seconds of an iteration's update for each response.

    Weights, optimizer and the policy's mode stay as they are, and gradients are freed. Old log-probs are timed if the
    update needs them. With dynamic sampling and one update a rollout only groups that wait for a later update do, so
    their seconds are an upper limit.

    Args:
        module: The module, with its policy loaded.
        loss: Its loss.
        groups: All sampled groups of an arm. The old log-probs of every one are timed, and the passes over the first
            ``TIMED_GROUPS``.
    """
    policy = module.loaded_policy
    was_training = policy.training
    # Lightning predicts in inference mode, whose tensors have no gradients.
    with torch.inference_mode(False), torch.enable_grad(), module.trainer.precision_plugin.train_step_context():
        policy.train()
        try:
            _timed(module, loss, groups[:1])  # the first pass makes room and compiles
            return _timed(module, loss, groups)
        finally:
            policy.zero_grad(set_to_none=True)
            policy.train(was_training)


def _timed(module: RPOModule, loss: PolicyLoss, groups: Sequence[Group]) -> UpdateSeconds:
    # Copies: a group that has its old log-probs would not compute them again.
    copies = [first_members(group, module.group_size) for group in groups]
    settings, trained = module.update, copies[:TIMED_GROUPS]
    advantages = group_advantages([group.rewards for group in trained])  # whatever their values, they take as long
    start = _now()
    if settings.updates_per_rollout > 1 or module.buffer is not None:
        loss.store_old_logprobs(copies)
        between = _now()
    else:
        between = start
    loss.backward(trained, advantages, _backward)
    passes = (_now() - between) * settings.passes_per_rollout
    return UpdateSeconds((between - start) / _responses(copies), passes / _responses(trained))


def _responses(groups: Sequence[Group]) -> int:
    return sum(len(group.completions) for group in groups)


def _backward(loss: Tensor, is_last: bool) -> None:
    torch.autograd.backward(loss)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
