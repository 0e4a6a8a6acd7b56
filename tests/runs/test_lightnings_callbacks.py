"""Lightning's own ways to end a run and to keep its best checkpoint, as the configuration page shows them."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rpo_lightning.callbacks import HuggingFaceExportCallback, RunSummaryCallback
from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data import ArithmeticChain
from tests.conftest import make_data, make_module, make_trainer
from tests.documents import ROOT, blocks


def test_the_pages_config_ends_a_run_that_gets_no_better_and_keeps_its_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for block in blocks(ROOT / "docs" / "configuration.md", "yaml") if "EarlyStopping" in block]
    (tmp_path / "page.yaml").write_text(shown)
    main([
        "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", "page.yaml",
        "--trainer.val_check_interval=1", "--trainer.max_steps=20", "--data.train.size=8", "--data.val.size=4",
        "--data.batch_size=2", "--model.group_size=2", "--trainer.num_sanity_val_steps=0", "--cache=null",
        "--model.max_response_tokens=8",  # too short for an answer: accuracy stays 0
    ])  # fmt: skip
    (folder,) = tmp_path.glob("runs/quickstart/version_0")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 6  # the first is the best, and five are no better
    assert summary["accuracy_after"] == 0
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == ["best-step=1.ckpt", "last.ckpt"]
    assert (folder / "policy" / "model.safetensors").exists()


def test_the_best_checkpoint_is_that_of_the_highest_accuracy_and_answers_as_then(tmp_path):
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", monitor="val/accuracy", mode="max")
    stopping = EarlyStopping("val/accuracy", mode="max", patience=1)
    train, val = (ArithmeticChain(size=8, operations=6, seed=seed) for seed in (1, 2))
    data = make_data(train=train, val=val, batch_size=2)
    summary = RunSummaryCallback()
    trainer = make_trainer(
        tmp_path, max_steps=4, callbacks=[stopping, saving, summary], limit_val_batches=1.0, val_check_interval=1,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    module = make_module(max_response_tokens=60, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer.fit(module, datamodule=data)
    values = [accuracy for _, accuracy in summary.accuracies]
    best = values.index(max(values))
    assert len(values) == min(best + 1 + 1, 4)  # it ended one validation after the best
    assert saving.best_model_path.endswith(f"step={best + 1}.ckpt")
    again = make_trainer(tmp_path / "again", limit_val_batches=1.0)
    (metrics,) = again.validate(
        module, datamodule=data, ckpt_path=saving.best_model_path, verbose=False, weights_only=True
    )
    assert metrics["val/accuracy"] == pytest.approx(max(values))


def test_a_run_whose_time_is_over_ends_after_an_iteration_as_at_its_planned_end(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=5, max_time={"microseconds": 1}, limit_val_batches=1.0,
        callbacks=[HuggingFaceExportCallback(), RunSummaryCallback()],
    )  # fmt: skip
    trainer.fit(make_module(max_response_tokens=16), datamodule=make_data())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == trainer.global_step == 1
    assert summary["accuracy_after"] is not None
    assert (tmp_path / "policy" / "model.safetensors").exists()


RUN = [
    "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--cache=null", "--trainer.logger=false",
    "--data.train.size=2", "--data.val.size=2", "--data.batch_size=2", "--model.group_size=2",
    "--model.max_response_tokens=4", "--trainer.num_sanity_val_steps=0", "--trainer.max_steps=1",
    "--trainer.val_check_interval=1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (["EarlyStopping", "--trainer.callbacks.monitor=val/acuracy"], "metric `val/acuracy` which is not available"),
        (["ModelCheckpoint", "--trainer.callbacks.monitor=val/acuracy"], "could not find the monitored key"),
    ],
)
def test_a_metric_that_there_is_not_is_told_in_a_line(tmp_path, monkeypatch, capsys, callback, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*RUN, "--trainer.callbacks", *callback])
    (told,) = [text for text in capsys.readouterr().err.splitlines() if "rpo-lightning: error" in text]
    assert line in told


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_callback_that_monitors_validations_needs_some(tmp_path, kind):
    train = ArithmeticChain(size=2)
    for data, settings, missing in (
        (make_data(train=train, val="", batch_size=2), {}, "data.val is not set"),
        (make_data(train=train, val=train, batch_size=2), {"limit_val_batches": 0}, "trainer.limit_val_batches is 0"),
    ):
        trainer = make_trainer(tmp_path, callbacks=[kind(monitor="val/accuracy")], **settings)
        with pytest.raises(ConfigurationError, match=f"{kind.__name__} monitors val/accuracy, and {missing}"):
            trainer.fit(make_module(), datamodule=data)


def test_a_run_without_training_batches_says_that_nothing_is_trained(tmp_path, caplog):
    data = make_data(train=ArithmeticChain(size=2), val="", batch_size=2)
    make_trainer(tmp_path, limit_train_batches=0).fit(make_module(), datamodule=data)
    assert "trainer.limit_train_batches=0: nothing is trained" in caplog.text
