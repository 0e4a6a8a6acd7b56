"""The command line, in process: every config, every subcommand, overrides, reproduction, one-line errors."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from safetensors.torch import load_file

from rpo_lightning.cache.budgets import FullBudget
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, FractionOfShortestCut
from rpo_lightning.cache.parquet import write_cache
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh
from rpo_lightning.callbacks import ExperienceCacheCallback, HuggingFaceExportCallback, RunSummaryCallback
from rpo_lightning.callbacks.run_folder import last_checkpoint
from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.cli.main import main
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.rollout import VLLMEngine

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = [
    "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps", "2",
    "--data.train.size", "8", "--data.val.size", "8",
    "--data.batch_size", "4", "--model.group_size", "3", "--model.max_response_tokens", "256",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last_run(name: str = "quickstart") -> Path:
    return sorted((Path("runs") / name).glob("version_*"))[-1]


def parse(config: Path, *overrides: str):
    return RPOCLI(
        RPOModule,
        RPODataModule,
        run=False,
        args=["--config", str(config), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
              "--trainer.precision", "32-true", *overrides],
        auto_configure_optimizers=False,
        save_config_callback=None,
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_every_config_says_what_it_is_for_and_is_accepted(config, monkeypatch):
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# ")
    # Everything but the policy itself, which lies on a hub, is instantiated.
    cli = parse(config, "--model.policy", "embedded:arithmetic-reasoner")
    kinds = [type(c) for c in cli.trainer.callbacks]
    assert kinds.index(HuggingFaceExportCallback) < kinds.index(RunSummaryCallback)  # which lists what it wrote
    cache = [c for c in cli.trainer.callbacks if isinstance(c, ExperienceCacheCallback)]
    assert len(cache) == (0 if config.stem in ("grpo", "dapo", "evaluate") else 1)


def test_a_limit_of_one_batch_is_told_to_be_all_of_them(caplog):
    cli = parse(ROOT / "configs" / "quickstart.yaml", "--trainer.limit_test_batches", "1")
    assert "trainer.limit_test_batches: 1 is read as 1.0" in caplog.text
    assert cli.trainer.limit_test_batches == 1.0
    caplog.clear()
    cli = parse(ROOT / "configs" / "quickstart.yaml", "--trainer.limit_test_batches", "2")
    assert "is read as" not in caplog.text


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_rpo_and_its_baseline_differ_in_the_cache_alone(name):
    baseline, rpo = (yaml.safe_load((ROOT / "configs" / f"{n}.yaml").read_text()) for n in (name, f"{name}_rpo"))
    assert rpo.pop("cache")
    assert rpo["trainer"]["logger"]["init_args"].pop("name") != baseline["trainer"]["logger"]["init_args"].pop("name")
    assert rpo == baseline


@pytest.mark.parametrize("name", ["quickstart", "gsm8k_smollm2"])
def test_a_vllm_config_differs_from_its_original_in_the_engine_alone(name):
    original, vllm = (yaml.safe_load((ROOT / "configs" / f"{n}.yaml").read_text()) for n in (name, f"{name}_vllm"))
    assert vllm["model"].pop("engine")["class_path"] == "VLLMEngine"
    loggers = [config["trainer"].pop("logger") for config in (original, vllm)]
    assert [logger["init_args"]["name"] for logger in loggers] == [name, f"{name}_vllm"]
    assert vllm == original


@pytest.mark.parametrize("name", ["grpo", "grpo_rpo", "dapo", "dapo_rpo"])
def test_the_papers_configs_roll_out_on_vllm(name):
    cli = parse(ROOT / "configs" / f"{name}.yaml", "--model.policy", "embedded:arithmetic-reasoner")
    assert isinstance(cli.model.engine, VLLMEngine)


def test_the_papers_values_are_those_of_its_configs():
    cli = parse(ROOT / "configs" / "dapo_rpo.yaml", "--model.policy", "embedded:arithmetic-reasoner")
    (cache,) = [c for c in cli.trainer.callbacks if isinstance(c, ExperienceCacheCallback)]
    assert isinstance(cache.cut, FractionOfShortestCut)
    assert cache.cut.fraction == 0.5
    assert isinstance(cache.refresh, EpsilonGreedyRefresh)
    assert cache.refresh.epsilon == 0.5
    assert isinstance(cache.budget, FullBudget)
    assert (cli.model.group_size, cli.model.sampling.temperature) == (6, 0.7)
    assert cli.model.group_size * cli.datamodule.batch_size == 576
    assert (cli.model.objective.clip_low, cli.model.objective.clip_high) == (0.2, 0.28)


def test_fit_trains_saves_everything_and_sums_up(capsys):
    main(["fit", *SMALL, "--cache.cut", "AnchoredCut", "--cache.cut.low", "0.2"])
    run = last_run()
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "accuracy_before",
        "accuracy_after",
        "decoded_tokens_per_sample",
        "full_path_tokens_per_sample",
        "initialisation_tokens",
        "seconds",
    ):
        assert summary[key] is not None, key
    assert summary["updates"] == 2
    log = pd.read_csv(run / "metrics.csv")
    per_sample = log["rollout/decoded_tokens_per_sample"].dropna()
    assert summary["decoded_tokens_per_sample"] == pytest.approx(per_sample.mean())
    assert summary["accuracy_before"] == log["val/accuracy"].dropna().iloc[0]
    assert summary["accuracy_after"] == log["val/accuracy"].dropna().iloc[-1]
    printed = capsys.readouterr().out
    for name in ("policy", "metrics.csv", "cache.parquet", "summary.json", "config.yaml"):
        assert (run / name).exists(), name
        assert name in printed or name == "config.yaml"


def test_the_saved_config_reproduces_the_run():
    main(["fit", *SMALL])
    first = last_run()
    main(["fit", "--config", str(first / "config.yaml")])
    second = last_run()
    assert second != first
    weights = [load_file(run / "policy" / "model.safetensors") for run in (first, second)]
    assert all((weights[0][n] == weights[1][n]).all() for n in weights[0])


def test_fit_resumes_from_the_last_checkpoint():
    main(["fit", *SMALL])
    main(["fit", *SMALL, "--trainer.max_steps", "3", "--ckpt_path", str(next(last_run().glob("checkpoints/*.ckpt")))])
    summary = json.loads((last_run() / "summary.json").read_text())
    assert summary["updates"] == 3
    assert summary["samples"] == 3 * 4 * 3
    assert summary["accuracy_before"] is not None


def test_last_is_the_newest_checkpoint_of_the_experiment_and_a_first_run_starts_from_the_beginning(caplog):
    main(["fit", *SMALL, "--ckpt_path", "last"])
    assert "there is none yet" in caplog.text
    assert json.loads((last_run() / "summary.json").read_text())["updates"] == 2
    main(["fit", *SMALL, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    assert last_run().name == "version_1"
    log = pd.read_csv(last_run() / "metrics.csv")
    assert log["loss/total"].notna().sum() == 1  # the third update alone


class RemoteLogger(Logger):
    """Has the folders of a tracking service's logger: ``save_dir``, a project, and a name for every run."""

    runs = itertools.count()

    def __init__(self, save_dir: str = "."):
        super().__init__()
        self._save_dir = save_dir
        self._version = f"run-{next(self.runs)}"

    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: "project")
    version = property(lambda self: self._version)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_run_with_another_logger_has_a_folder_of_its_own_and_is_found_again():
    logger = ["--trainer.logger", f"{__name__}.RemoteLogger", "--trainer.max_steps", "1", "--ckpt_path", "last"]
    main(["fit", *SMALL, *logger])
    (first,) = Path("runs/project").iterdir()
    left = {path.name for path in first.iterdir()}
    assert left == {"checkpoints", "policy", "cache.parquet", "completions.jsonl", "config.yaml", "summary.json"}
    main(["fit", *SMALL, *logger, "--trainer.max_steps", "2"])
    (second,) = set(Path("runs/project").iterdir()) - {first}
    summary = json.loads((second / "summary.json").read_text())
    assert (summary["updates"], summary["samples"]) == (2, 2 * 4 * 3)
    assert [str(path) for path in (*Path().iterdir(), *Path("runs").iterdir())] == ["runs", "runs/project"]


@pytest.mark.parametrize(
    ("logger", "settings", "path"),
    [
        (CSVLogger("runs", "name"), {}, "runs/name/version_3/checkpoints/last.ckpt"),
        (CSVLogger("runs", "name", "mine"), {}, "runs/name/theirs/checkpoints/last-v1.ckpt"),
        (CSVLogger("runs", None, ""), {}, "runs/checkpoints/last.ckpt"),
        (TensorBoardLogger("runs", version="mine"), {}, "runs/lightning_logs/a/checkpoints/last.ckpt"),
        (CSVLogger("runs"), {"dirpath": "saved"}, "saved/last.ckpt"),
        (False, {}, "checkpoints/last.ckpt"),
        (RemoteLogger("runs"), {}, "runs/project/another/checkpoints/last.ckpt"),
    ],
)
def test_last_is_wherever_checkpoint_callbacks_save(logger, settings, path):
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[ModelCheckpoint(**settings)])
    assert last_checkpoint(trainer) is None
    elsewhere = Path("elsewhere/version_0/checkpoints/last.ckpt")
    for number, made in enumerate((Path(path).with_name("step=3.ckpt"), Path(path), elsewhere)):
        made.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}, "rpo": {}}, made)
        os.utime(made, (number, number))
    assert last_checkpoint(trainer, to_train=False).resolve() == Path(path).resolve()
    Path(path).write_bytes(Path(path).read_bytes()[:-1])  # damaged, so the one before it is taken
    assert last_checkpoint(trainer, to_train=False).name == "step=3.ckpt"


def test_a_class_of_the_users_own_is_named_by_its_module_in_the_working_directory(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    Path("brevity.py").write_text(
        "from rpo_lightning.rewards import Reward\n\n\nclass Brevity(Reward):\n"
        "    def score(self, group):\n        return [1 / s.length for s in group]\n"
    )
    main(["fit", *SMALL, "--trainer.max_steps", "1", "--model.rewards", '[{"class_path": "brevity.Brevity"}]'])
    log = pd.read_csv(last_run() / "metrics.csv")
    assert 0 < log["reward/mean"].dropna().iloc[-1] < 0.1


def test_a_file_of_one_question_is_a_file_and_not_settings():
    Path("one.jsonl").write_text('{"question": "^1+1=", "answer": "2"}\n')
    cli = parse(ROOT / "configs" / "quickstart.yaml", "--data.test", "one.jsonl", "--data.train", "one.jsonl")
    assert cli.datamodule.sources["test"] == "one.jsonl"
    assert cli.datamodule.sources["train"] == "one.jsonl"


def test_a_trial_run_leaves_nothing_behind(capsys):
    main(["cache", "build", *SMALL])
    before = Path("cache.parquet").read_bytes()
    trial = ["--trainer.fast_dev_run", "true"]
    source = '{"class_path": "ArithmeticChain", "init_args": {"size": 4}}'
    main(["fit", *SMALL, *trial, "--cache.path", "cache.parquet"])
    assert "decoded tokens per sample" in capsys.readouterr().out
    for command in ("validate", "test", "predict"):
        main([command, *SMALL, *trial, "--data.test", source, "--data.predict", source])
    assert capsys.readouterr().out.count("| set | questions |") == 2  # of validate and test
    assert [str(path) for path in Path().rglob("*")] == ["cache.parquet"]
    assert Path("cache.parquet").read_bytes() == before


def test_a_run_does_not_save_its_cache_over_the_one_it_starts_from(tokenizer, capsys):
    cache = ExperienceCache(tokenizer_fingerprint(tokenizer))
    write_cache(cache, "cache.parquet")
    before = Path("cache.parquet").read_bytes()
    Path("link").symlink_to(".")
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, "--trainer.logger", "false", "--cache.path", "link/cache.parquet"])
    assert "cache.path=link/cache.parquet is where this run would save its own cache" in capsys.readouterr().err
    assert Path("cache.parquet").read_bytes() == before


def test_cache_null_is_the_full_path():
    main(["fit", *SMALL, "--cache", "null"])
    log = pd.read_csv(last_run() / "metrics.csv")
    assert (log["rollout/full_path_share"].dropna() == 1).all()
    assert not (last_run() / "cache.parquet").exists()


def test_validate_test_and_predict_answer_without_a_prefix(capsys):
    source = '{"class_path": "ArithmeticChain", "init_args": {"size": 4}}'
    questions = ["--data.test", source, "--data.predict", source]
    main(["validate", *SMALL, *questions])
    main(["test", *SMALL, *questions, "--model.evaluation.samples", "2"])
    printed = capsys.readouterr().out
    validated, tested = (line.split(" | ") for line in printed.splitlines() if line.startswith("| all | "))
    assert (validated[1], tested[1]) == ("8", "4")  # questions
    main(["predict", *SMALL, *questions, "--model.evaluation.samples", "2"])
    answers = [json.loads(line) for line in (last_run() / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert {"uid", "prompt", "response", "answer", "correct", "length", "finished"} <= answers[0].keys()


def test_print_config_shows_overrides(capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *SMALL,
                "--cache.refresh",
                "EpsilonGreedyRefresh",
                "--cache.refresh.epsilon",
                "0.25",
                "--print_config",
            ]
        )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["cache"]["init_args"]["refresh"]["init_args"] == {"epsilon": 0.25}
    assert shown["cache"]["init_args"]["cut"]["class_path"].endswith(AnchoredCut.__name__)


def test_the_printed_config_of_a_deepspeed_run_is_a_config():
    pytest.importorskip("deepspeed")
    config = ROOT / "configs" / "dapo_rpo_7b_deepspeed.yaml"
    command = [sys.executable, "-m", "rpo_lightning", "fit", "--config", str(config), "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "DeepSpeed" in yaml.safe_load(done.stdout)["trainer"]["strategy"]["class_path"]


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "rpo_lightning", "--help"], capture_output=True, text=True, check=True)
    assert "fit" in done.stdout


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, rpo_lightning.cli.main; print([m for m in ('vllm', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--data.question_column", "text"], "no column 'text'"),
        (["--data.train", "empty.jsonl"], "empty.jsonl: no usable question"),
        (["--data.train", "broken.jsonl"], "broken.jsonl, line 2: malformed JSON"),
        (["--data.train", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--model.group_size", "1"], "model.group_size must be at least 2"),
        (["--model.policy", "models/not/there"], "models/not/there: no such model folder"),
        (["--cache.budget.slack", "0"], "suffix budget of 0"),
        (["--data.train", "latin.jsonl"], "latin.jsonl, line 1: not UTF-8"),
        (["--data.train", "table.csv"], "table.csv: questions are read from .jsonl"),
        (["--ckpt_path", "not/there.ckpt"], "--ckpt_path not/there.ckpt: no such file"),
        (["--trainer.strategy", "nonsense"], "trainer: "),
        (["--trainer.gradient_clip_val", "1.0"], "use model.update.max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "2"], "use data.batch_size"),
        (["--model.update.max_grad_norm", "0"], "model.update.max_grad_norm must be above 0"),
        (["--model.lr_schedule.warmup_share", "0.1"], "constant has no warm-up: use constant_with_warmup"),
        (["--model.lr_schedule.warmup_share", "10"], "warmup_share must be from 0 to 1"),
        (["--cache.path", "foreign.parquet"], "foreign.parquet: made with another tokenizer"),
        (["--cache.path", "other.parquet"], "other.parquet: made for another data set"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_it(overrides, expected, capsys, tokenizer):
    Path("empty.jsonl").write_text("")
    Path("latin.jsonl").write_bytes('{"question": "é", "answer": "2"}'.encode("latin-1"))
    Path("table.csv").write_text("question,answer\n1+1,2\n")
    Path("broken.jsonl").write_text('{"question": "1a+1=", "answer": "2"}\n{"question"\n')
    write_cache(ExperienceCache("foreign"), "foreign.parquet")
    other = ExperienceCache(tokenizer_fingerprint(tokenizer))
    other.entry("some question")
    write_cache(other, "other.parquet")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *SMALL, *overrides])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rpo-lightning: error: ")
    assert expected in error
