"""Over thousands of iterations a run's memory, open files, processes and threads stay flat, and its files bounded."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache import UniformCut
from rpo_lightning.callbacks import CompletionsCallback, HuggingFaceExportCallback, RunSummaryCallback
from rpo_lightning.data import ArithmeticChain
from rpo_lightning.rewards import FunctionReward
from tests.conftest import make_data, make_module, make_trainer
from tests.faults.runs import ROOT

ITERATIONS, EVERY = 2_000, 100


class Footprint(Callback):
    """Looks at the process now and then."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.iteration % EVERY == 0 and pl_module.iteration:
            gc.collect()
            process = psutil.Process()
            self.rows.append(
                {
                    "iteration": pl_module.iteration,
                    "bytes": process.memory_info().rss,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "processes": len(process.children(recursive=True)),
                }
            )


@pytest.mark.soak
def test_two_thousand_iterations_take_no_more_than_the_first_few_hundred(micro_policy, tokenizer, tmp_path):
    footprint = Footprint()
    module = make_module(
        policy=AutoModelForCausalLM.from_pretrained(micro_policy), tokenizer=tokenizer, group_size=2,
        rewards=[FunctionReward("tests.faults.runs.share_of_digits")], max_response_tokens=6,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )  # fmt: skip
    callbacks = [
        ExperienceCacheCallback(cut=UniformCut(4), initialisation="lazy", keep_unfinished=True),
        CompletionsCallback(every_n_batches=1),
        HuggingFaceExportCallback(every_n_steps=1_000),
        RunSummaryCallback(),
        ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=50, save_last=True),
        footprint,
    ]
    trainer = make_trainer(
        tmp_path, max_steps=ITERATIONS + 1, callbacks=callbacks, limit_val_batches=1, val_check_interval=200,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    data = make_data(train=ArithmeticChain(size=64, seed=1, operations=2), batch_size=2)
    trainer.fit(module, datamodule=data)
    rows = footprint.rows
    assert len(rows) == ITERATIONS // EVERY
    settled, last = rows[4], rows[-1]
    for name in ("files", "threads", "processes"):
        assert last[name] <= settled[name], name
    assert last["bytes"] < 1.03 * settled["bytes"]
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2
    record(rows, tmp_path)


def record(rows: list[dict[str, int]], folder: Path) -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    from common.machine import hardware

    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    figures = {"hardware": hardware(), "iterations": ITERATIONS, "rows": rows, "bytes_of_files": sizes}
    (ROOT / "benchmarks" / "results" / "soak.json").write_text(json.dumps(figures, indent=1) + "\n")
