"""One of two ranks that train under DeepSpeed's ZeRO on the CPU; run by torchrun from ``test_deepspeed.py``.

Arguments: output folder, ZeRO stage (0: one process without DeepSpeed), names of scenarios. Each scenario writes its
results to a folder of its name.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from rpo_lightning import RPOModule
from rpo_lightning.cache.cuts import FractionOfShortestCut
from rpo_lightning.callbacks import ExperienceCacheCallback, HuggingFaceExportCallback
from rpo_lightning.core.errors import UpdateError
from rpo_lightning.core.types import Group
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.weights import named_weights
from rpo_lightning.rewards import UniformRandomReward
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from rpo_lightning.update.mismatch import MismatchBound
from rpo_lightning.update.objectives import GRPO
from rpo_lightning.update.schedule import LearningRateSchedule
from tests.conftest import make_data, make_group, make_module, make_trainer


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """The strategy without Lightning's checks for GPUs."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        # Everything goes over gloo. DeepSpeed would compile its own collectives in shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm_op"] = False
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        initialize = deepspeed.initialize
        # Drop the device number in ``args``; a CPU has none.
        deepspeed.initialize = lambda args, **settings: initialize(**settings)
        try:
            super().init_deepspeed()
        finally:
            deepspeed.initialize = initialize


def deepspeed_trainer(folder: Path, stage: int, config: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """Two ranks; even small parameters are partitioned."""
    config = {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **(config or {}),
    }
    strategy = DeepSpeedOnCPU(config=config, process_group_backend="gloo")
    return make_trainer(folder, devices=2, strategy=strategy, **settings)


def fixed_groups() -> list[Group]:
    """Groups of different lengths, with random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 15, (length,), generator=generator).tolist()

    return [
        make_group([0.0, 1.0, 0.5], [ids(5 + 7 * i), ids(9), ids(12 + i)], prompt_ids=ids(6 + i), uid=str(i))
        for i in range(4)
    ]


def fixed_module(rank: int, size: int, **settings: Any) -> RPOModule:
    """Trains on the same groups at every step. The last of two ranks has one of them, the first the rest."""
    groups = fixed_groups()
    mine = groups if size == 1 else (groups[3:] if rank else groups[:3])
    module = make_module(
        **{
            "objective": GRPO(beta=0.1),
            "micro_batch_tokens": 64,
            "max_grad_norm": 0.05,
            "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1),
            "lr_schedule": LearningRateSchedule("linear", warmup_share=0.4),
            "mismatch_bound": MismatchBound(1e6),
            **settings,
        }
    )

    def roll_out(*_: Any) -> list[Group]:
        for phase in ("prefill", "decode"):
            with module.timer(phase):
                pass
        return mine

    module.roll_out = roll_out  # type: ignore[method-assign]
    return module


def update(folder: Path, stage: int, rank: int, **settings: Any) -> None:
    """Five updates on given groups."""
    of_trainer: dict[str, Any] = {"max_steps": 5, "callbacks": [HuggingFaceExportCallback()]}
    trainer = deepspeed_trainer(folder, stage, **of_trainer) if stage else make_trainer(folder, **of_trainer)
    trainer.fit(fixed_module(rank, trainer.world_size, **settings), datamodule=make_data(batch_size=1))


def adapter(folder: Path, stage: int, rank: int) -> None:
    """Five updates of an adapter on given groups."""
    torch.manual_seed(0)
    update(folder, stage, rank, adapter=LoRA(rank=4, alpha=8))


def not_finite(folder: Path, stage: int, rank: int) -> None:
    """Two updates with one between them whose log-probs are not finite, and then gradients that are not, to the end."""
    settings: dict[str, Any] = {"objective": GRPO(), "lr_schedule": LearningRateSchedule()}
    clean = fixed_module(rank, 2, **settings)
    deepspeed_trainer(folder / "clean", stage, max_steps=2).fit(clean, datamodule=make_data(batch_size=1))
    expected = {n: w.clone() for n, w in named_weights(clean.policy)}  # type: ignore[arg-type]
    module = fixed_module(rank, 2, **settings)
    sound, weigh = module.roll_out, module.objective.sequence_weights

    def roll_out(*arguments: Any) -> list[Group]:
        groups = sound(*arguments)
        if module.iteration == 1 and rank == 0:
            broken = [replace(c, logprobs=(-math.inf, *c.logprobs[1:])) for c in groups[0].completions]
            return [replace(groups[0], completions=broken), *groups[1:]]
        return groups

    module.roll_out = roll_out  # type: ignore[method-assign]
    module.objective.sequence_weights = (  # type: ignore[method-assign]
        lambda *given: weigh(*given) * (math.nan if module.iteration > 2 else 1.0)
    )
    try:
        trainer = deepspeed_trainer(folder / "faulty", stage, max_steps=9)
        trainer.fit(module, datamodule=make_data(batch_size=1))
        error = None
    except UpdateError as raised:
        error = str(raised)
    found = dict(named_weights(module.policy))  # type: ignore[arg-type]
    same = all(torch.equal(weight, found[name]) for name, weight in expected.items())
    result = {"error": error, "same": same, "skipped": module.watch.skipped, "updates": trainer.global_step}
    (folder / f"{rank}.json").write_text(json.dumps(result))


def make_loaded() -> Any:
    """A module with its policy."""
    module = make_module()
    module.configure_model()
    return module


def fit(folder: Path, stage: int, rank: int) -> None:
    """A whole run of four updates, and one that resumes it after two."""
    for name, resume in (("whole", None), ("resumed", folder / "whole" / "step=2.ckpt")):
        cache = ExperienceCacheCallback(cut=FractionOfShortestCut(0.5), keep_unfinished=True)
        checkpoint = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = make_module(
            rewards=[UniformRandomReward()],
            dynamic_sampling=DynamicSampling(max_refills=3, filter="reward"),
            lr_schedule=LearningRateSchedule("linear", warmup_share=0.5),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
            max_response_tokens=64,
        )
        trainer = deepspeed_trainer(
            folder / name, stage, max_steps=4, callbacks=[cache, checkpoint, HuggingFaceExportCallback()],
            limit_val_batches=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=make_data(batch_size=2), ckpt_path=resume)
        (folder / name / f"{rank}.json").write_text(
            json.dumps(
                {
                    "iteration": module.iteration,
                    "entries": sorted(
                        (e.uid, list(map(int, e.response.token_ids)) if e.response else []) for e in cache.cache
                    ),
                    "buffered": [g.request.prompt.uid for g in module.buffer.groups],  # type: ignore[union-attr]
                }
            )
        )


def validate(folder: Path, stage: int, rank: int) -> None:
    """Evaluation without training."""
    module = make_module(max_response_tokens=64)
    trainer = deepspeed_trainer(folder, stage, limit_val_batches=None)
    (metrics,) = trainer.validate(module, datamodule=make_data(batch_size=2), verbose=False)
    (folder / f"{rank}.json").write_text(json.dumps(metrics))


def main() -> None:
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("RANK", 0))
    for name in sys.argv[3:]:
        of_scenario = folder / name
        of_scenario.mkdir(parents=True, exist_ok=True)
        globals()[name](of_scenario, stage, rank)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
