"""One of the processes that update a policy on the same rollouts; run by torchrun from ``test_update_ranks.py``.

Arguments: output folder, strategies (``single``, ``ddp``, ``fsdp2``), one after the other. For each, the first rank
writes the parameters after every case of ``CASES`` and of ``FAULTS``. Every rank writes the largest number of members
in a row for each case, and its parameters after iterations in which groups are dropped at random.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

import rpo_lightning.update.loss
from rpo_lightning.core.types import Group
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.rewards import AccuracyReward, ExactMatchVerifier
from rpo_lightning.update.advantages import BatchScaled, ReinforcePlusPlus
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from rpo_lightning.update.importance import NoCorrection, TokenTruncated
from rpo_lightning.update.mismatch import MismatchBound
from rpo_lightning.update.objectives import DAPO, GRPO
from tests.conftest import make_data, make_group, make_trainer, with_update

CASES: dict[str, dict[str, Any]] = {
    "token-mean": {"objective": DAPO()},
    "sequence-mean with KL": {"objective": GRPO(beta=0.1)},
    "batch advantages, two passes": {"advantages": BatchScaled(), "passes_per_rollout": 2},
    "batch mean, entropy bonus": {"objective": DAPO(entropy_bonus=0.1), "advantages": ReinforcePlusPlus()},
    "sharded accumulation": {"objective": DAPO(), "accumulate_sharded": True},
    "groups in several passes": {"objective": GRPO(beta=0.1), "micro_batch_tokens": 100},
    "adapter with KL": {"objective": GRPO(beta=0.1), "adapter": LoRA(rank=2)},
}


# An update of three is skipped on all ranks: all weights are those of the other two.
FAULTS: dict[str, dict[str, Any]] = {
    "reward": {"fault": "reward"},
    "engine's log-prob": {"fault": "-inf", "importance_correction": TokenTruncated()},
}


# By the nineteenth, every pair of shares that two ranks may keep has occurred.
DROPPED_ITERATIONS = 20


class GivenRollouts(RPOModule):
    """Trains on given groups instead of sampled ones."""

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "policy": "embedded:arithmetic-reasoner",
            "rewards": [AccuracyReward()],
            "verifier": ExactMatchVerifier(),
            "max_response_tokens": 64,
            "micro_batch_tokens": 128,
            # With plain SGD the parameters show the gradients. Clipping makes the norm count.
            "max_grad_norm": 0.05,
            # The engine's log-probs are made up and must not be compared with the policy's.
            "importance_correction": NoCorrection(),
            "mismatch_bound": MismatchBound(largest=1e9, jump=1e9),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        }
        super().__init__(**with_update({**defaults, **settings}))

    def roll_out(self, *_: Any, **__: Any) -> list[Group]:
        """This rank's groups."""
        self.timer.move("decode", "prefill", 0.0)
        return uneven_groups(self.iteration)[self.ranks.rank :: self.ranks.size]


class FaultyRollouts(GivenRollouts):
    """Rollouts of which one response has an engine's log-prob, or a reward, that is not finite; in iteration 1 only."""

    def __init__(self, fault: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.fault = fault

    def roll_out(self, *_: Any, **__: Any) -> list[Group]:
        """This rank's groups; the first rank's first one has the fault."""
        groups = super().roll_out()
        if self.iteration == 1 and self.ranks.rank == 0:
            first = groups[0]
            if self.fault == "reward":
                first.rewards[0] = float("nan")
            else:
                values = (float(self.fault), *first.completions[0].logprobs[1:])
                first.completions[0] = replace(first.completions[0], logprobs=values)
        return groups


class DroppedGroups(GivenRollouts):
    """Rollouts in which random groups have no variance, sometimes all groups of a rank."""

    def roll_out(self, *_: Any, **__: Any) -> list[Group]:
        """Groups that depend on rank and iteration."""
        self.timer.move("decode", "prefill", 0.0)
        rng = np.random.default_rng((self.ranks.rank, self.iteration))
        share = rng.choice([0.0, 0.3, 1.0])
        groups = uneven_groups(self.iteration * 2 + self.ranks.rank)[:4]
        for group in groups:
            if rng.random() >= share:
                group.rewards = [1.0] * len(group.rewards)
        return groups


def uneven_groups(seed: int) -> list[Group]:
    """Five groups: the first of two ranks gets three. Suffixes have 2 to 59 tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(5):
        members = 2 + index % 3
        suffixes = [rng.integers(3, 48, rng.integers(2, 60)).tolist() for _ in range(members)]
        rewards = rng.random(members).tolist()
        prompt, prefix = rng.integers(3, 48, 6).tolist(), rng.integers(3, 48, rng.integers(0, 40)).tolist()
        groups.append(make_group(rewards, suffixes, prompt, prefix, uid=f"q{index}"))
    return groups


def strategy(name: str) -> Any:
    """Lightning's strategy by name."""
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"single": "auto", "ddp": "ddp"}[name]


def parameters(module: RPOModule) -> dict[str, torch.Tensor]:
    """The trained parameters, whole."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.policy.named_parameters()
        if p.requires_grad
    }


def update(module: RPOModule, name: str, folder: Path, iterations: int) -> dict[str, torch.Tensor]:
    """Train, and return the parameters."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)
    devices = 1 if name == "single" else 2
    trainer = make_trainer(
        folder, devices=devices, strategy=strategy(name), max_steps=-1, max_epochs=1, limit_train_batches=iterations,
        enable_checkpointing=False, logger=False,
    )  # fmt: skip
    questions = [{"question": str(i), "answer": "1"} for i in range(128)]
    trainer.fit(module, datamodule=make_data(batch_size=1, train=questions))
    return parameters(module)


def note_rows() -> list[int]:
    """Make the update note the number of members of each row that it computes, in the returned list."""
    members: list[int] = []

    def noted(model: Any, batch: Any, *rest: Any) -> Any:
        members.extend(len(row.members) for row in batch)
        return token_logprobs(model, batch, *rest)

    rpo_lightning.update.loss.token_logprobs = noted
    return members


def write_updates(name: str, folder: Path, members: list[int]) -> None:
    """Write what this rank finds with a strategy."""
    rank = int(os.environ.get("RANK", "0"))
    found, fullest = {}, {}
    for case, settings in CASES.items():
        members.clear()
        found[case] = update(GivenRollouts(**settings), name, folder, 2)
        fullest[case] = max(members)
    for case, settings in FAULTS.items():
        module = FaultyRollouts(**{"mismatch_bound": MismatchBound(largest=1e9, jump=1e9), **settings})
        found[case] = update(module, name, folder, 3)
        assert (module.watch.skipped, module.watch.skipped_in_a_row, module.policy_version) == (1, 0, 2), case
    if rank == 0:
        torch.save(found, folder / f"{name}.pt")
    torch.save(fullest, folder / f"{name}-members-{rank}.pt")
    if name != "single":
        dropped = DroppedGroups(dynamic_sampling=DynamicSampling(max_refills=1, filter="reward"))
        torch.save(update(dropped, name, folder, DROPPED_ITERATIONS), folder / f"{name}-dropped-{rank}.pt")
        assert dropped.iteration == DROPPED_ITERATIONS


def main() -> None:
    members = note_rows()
    for name in sys.argv[2:]:
        write_updates(name, Path(sys.argv[1]), members)


if __name__ == "__main__":
    main()
