"""Times the update of a plan: forward and backward passes on sampled groups, without an optimizer step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from rpo_lightning.cli.plan.arms import first_members
from rpo_lightning.core.types import Group
from rpo_lightning.module import RPOModule
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss

# Groups that are timed. More take longer and change little: an iteration is a multiple of them.
TIMED_GROUPS = 8


def can_time(module: RPOModule) -> bool:
    """Whether the update can be timed: other strategies set their gradients up for a training run only."""
    return isinstance(module.trainer.strategy, SingleDeviceStrategy)


def seconds_per_response(module: RPOModule, loss: PolicyLoss, groups: Sequence[Group]) -> float:
    """Seconds of an iteration's update for each response, all passes over it included.

    Weights, optimizer and the policy's mode stay as they are, and gradients are freed.

    Args:
        module: The module, with its policy loaded.
        loss: Its loss.
        groups: Sampled groups, at most :data:`TIMED_GROUPS` of which are used.
    """
    timed = [first_members(group, module.group_size) for group in groups[:TIMED_GROUPS]]
    policy = module.loaded_policy
    was_training = policy.training
    # Lightning predicts in inference mode, whose tensors have no gradients.
    with torch.inference_mode(False), torch.enable_grad(), module.trainer.precision_plugin.train_step_context():
        policy.train()
        try:
            _pass(module, loss, timed[:1])  # the first pass makes room and compiles
            seconds = _pass(module, loss, timed)
        finally:
            policy.zero_grad(set_to_none=True)
            policy.train(was_training)
    return seconds / sum(len(group.completions) for group in timed)


def _pass(module: RPOModule, loss: PolicyLoss, groups: list[Group]) -> float:
    """Seconds of an update on groups: their old log-probs if the update needs them, and its passes over them."""
    settings = module.update
    advantages = group_advantages([group.rewards for group in groups])  # whatever their values, they take as long
    start = _now()
    if settings.updates_per_rollout > 1 or module.buffer is not None:
        loss.store_old_logprobs(groups)
    between = _now()
    loss.backward(groups, advantages, _backward)
    return between - start + (_now() - between) * settings.passes_per_rollout


def _backward(loss: Tensor, is_last: bool) -> None:
    torch.autograd.backward(loss)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
