"""Bad checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rpo_lightning.cli.main import main
from tests.faults.bad_inputs.case import RUN, RUN_FILE, BadInput, run
from tests.faults.bad_inputs.policies import Executes

_CACHE = "--cache.initialisation lazy"
_FIT = run("fit", _CACHE, "--ckpt_path bad.ckpt")


@cache
def _saved() -> bytes:
    """A checkpoint of the run of ``run.yaml``, with a cache."""
    here = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path(RUN_FILE).write_text(RUN)
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                main(["fit", "--config", RUN_FILE, *_CACHE.split()])
            return next(Path("checkpoints").glob("*.ckpt")).read_bytes()
        finally:
            os.chdir(here)


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    def make() -> None:
        checkpoint = torch.load(BytesIO(_saved()), weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, "bad.ckpt")

    return make


def _of_cache(change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    return _changed(lambda checkpoint: change(checkpoint["callbacks"]["ExperienceCacheCallback"]["cache"]))


def _torn() -> None:
    Path("bad.ckpt").write_bytes(_saved()[:-1000])


def _overwritten() -> None:
    content = bytearray(_saved())
    third, half = len(content) // 3, len(content) // 2
    content[third:half] = bytes(half - third)
    Path("bad.ckpt").write_bytes(content)


def _pickled() -> None:
    torch.save({"state_dict": {}, "rpo": Executes()}, "bad.ckpt")


def _pickled_as_of_old() -> None:
    torch.save({"state_dict": {}, "rpo": Executes()}, "bad.ckpt", _use_new_zipfile_serialization=False)


# fmt: off
CHECKPOINTS = [
    BadInput("a missing checkpoint", _FIT,
             line="--ckpt_path bad.ckpt: no such file: check the path"),
    BadInput("an empty checkpoint", _FIT, files={"bad.ckpt": ""},
             line="bad.ckpt: the checkpoint is damaged (an empty file); no whole one is beside it: try --ckpt_path last"),
    BadInput("a folder for a checkpoint", _FIT, files={"bad.ckpt/part": ""},
             line="--ckpt_path bad.ckpt: a folder that is no checkpoint of trainer.strategy: name a file, or use the strategy of the run that wrote it"),
    BadInput("a text for a checkpoint", _FIT, files={"bad.ckpt": "hello"},
             line="bad.ckpt: the checkpoint is damaged (torn, or no checkpoint); no whole one is beside it: try --ckpt_path last"),
    BadInput("a torn checkpoint", _FIT, make=_torn,
             line="bad.ckpt: the checkpoint is damaged (torn, or no checkpoint); no whole one is beside it: try --ckpt_path last"),
    BadInput("a torn checkpoint to predict with",
             run("predict", "--data.predict.class_path ArithmeticChain --data.predict.size 4 --ckpt_path bad.ckpt"),
             make=_torn,
             line="bad.ckpt: the checkpoint is damaged (torn, or no checkpoint); no whole one is beside it: try --ckpt_path last"),
    BadInput("a checkpoint with lost bytes", _FIT, make=_overwritten,
             line="bad.ckpt: the checkpoint is damaged (the checksum of its part … is wrong); no whole one is beside it: try --ckpt_path last"),
    BadInput("a checkpoint with code", _FIT, make=_pickled,
             line="--ckpt_path bad.ckpt: holds the Python object posix.system, which could run code when it is read, so it is not: name a checkpoint that fit wrote"),
    BadInput("a checkpoint with code, in torch's earlier format", _FIT, make=_pickled_as_of_old,
             line="bad.ckpt: the checkpoint is damaged (torn, or no checkpoint); no whole one is beside it: try --ckpt_path last"),
    BadInput("a file of weights", _FIT, make=lambda: torch.save({"weight": torch.zeros(2)}, "bad.ckpt"),
             line="--ckpt_path bad.ckpt: not a checkpoint of an RPO run: name a file that fit wrote, or start from exported weights with model.policy"),
    BadInput("a checkpoint of another program", _FIT, make=_changed(lambda saved: saved.pop("rpo")),
             line="--ckpt_path bad.ckpt: not a checkpoint of an RPO run: name a file that fit wrote, or start from exported weights with model.policy"),
    BadInput("a checkpoint of weights alone", _FIT, make=_changed(lambda saved: saved.pop("optimizer_states")),
             line="--ckpt_path bad.ckpt: holds no optimizer_states, which training needs to go on: name a checkpoint that was saved without save_weights_only, or start from exported weights with model.policy"),
    BadInput("a checkpoint without moments", _FIT, make=_changed(lambda saved: saved.update(optimizer_states=[])),
             line="--ckpt_path bad.ckpt: holds no optimizer_states, which training needs to go on: name a checkpoint that was saved without save_weights_only, or start from exported weights with model.policy"),
    BadInput("a checkpoint without its generators", _FIT, make=_changed(lambda saved: saved["rpo"].pop("generators")),
             line="--ckpt_path bad.ckpt: holds no rpo.generators, which training needs to go on: name a checkpoint that was saved without save_weights_only, or start from exported weights with model.policy"),
    BadInput("text for the number of updates", _FIT, make=_changed(lambda saved: saved.update(global_step="many")),
             line="--ckpt_path bad.ckpt: holds no global_step, which training needs to go on: name a checkpoint that was saved without save_weights_only, or start from exported weights with model.policy"),
    BadInput("a checkpoint without the trainer's progress", _FIT, make=_changed(lambda saved: saved.update(loops={})),
             line="--ckpt_path bad.ckpt: holds no loops.fit_loop.epoch_progress, which training needs to go on: name a checkpoint that was saved without save_weights_only, or start from exported weights with model.policy"),
    BadInput("a checkpoint of another policy", _FIT,
             make=_changed(lambda saved: saved["state_dict"].update({"policy.model.norm.weight": torch.zeros(7)})),
             line="the checkpoint is of another policy or adapter: model.norm.weight has shape [7] in the checkpoint and shape [96] in this run. Set model.policy and model.adapter as in the run that wrote it"),
    BadInput("a checkpoint whose cache lacks its questions", _FIT, make=_of_cache(lambda held: held.pop("uids")),
             line="the checkpoint's cache is damaged (no 'uids'): resume from another checkpoint"),
    BadInput("a checkpoint whose cache has a question twice", _FIT,
             make=_of_cache(lambda held: held.update(uids='["a", "a"]')),
             line="the checkpoint's cache is damaged (a question comes twice, or has no text as its uid): resume from another checkpoint"),
    BadInput("a checkpoint whose cache claims any size", _FIT,
             make=_of_cache(lambda held: held["visits"].update(visits=torch.zeros(1, dtype=torch.int64).expand(2**40))),
             line="the checkpoint's cache is damaged (a tensor of torch.int64 is expected, it is torch.int64 of shape [1099511627776]): resume from another checkpoint"),
    BadInput("a checkpoint whose cache is of another tokenizer", _FIT,
             make=_of_cache(lambda held: held.update(tokenizer="other")),
             line="the checkpoint's cache: made with another tokenizer (fingerprint other, this policy's is d8057a88592cb516), so its token ids mean other text: build a new cache"),
]
# fmt: on
