"""What the programs print: the real command line in processes of its own, on a terminal where it matters."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from rpo_lightning.callbacks import ProgressLinesCallback, RunProgressBar, progress_lines
from rpo_lightning.cli.commands import CACHE_COMMANDS, COMMANDS, COMMON_SETTINGS
from rpo_lightning.cli.main import main
from rpo_lightning.cli.quiet import HARMLESS_WARNINGS, silence_libraries
from tests.conftest import make_data, make_module, make_trainer

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps", "2",
    "--data.train.size", "8", "--data.val.size", "8", "--data.batch_size", "4", "--data.eval_batch_size", "4",
    "--model.group_size", "3", "--model.max_response_tokens", "256",
]  # fmt: skip
# What a run says of itself on stderr, a line each.
OF_A_RUN = re.compile(
    r"Seed set to 0|(GPU|TPU) available: .*|`Trainer.fit` stopped: .*|saved the policy to .*"
    r"|--ckpt_path last: .*|(Restoring|Restored all) states .*"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    """Run the command line in a new process, and some code after it."""
    program = f"import sys\nfrom rpo_lightning.cli.main import main\nmain({list(arguments)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def unexpected(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.strip() and not OF_A_RUN.fullmatch(line)]


def test_the_help_lists_every_command_with_its_line_and_imports_nothing_heavy():
    shown = "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse') if m in sys.modules])"
    done = run("--help", code=shown)
    assert done.stderr == ""
    *lines, imported = done.stdout.splitlines()
    for name, text in COMMANDS.items():
        assert f"  {name:<8}  {text}" in lines
    assert list(COMMANDS) == ["fit", "validate", "test", "predict", "plan", "segments", "cache", "report", "memory"]
    assert imported == "[]"


@pytest.mark.parametrize("arguments", [["fat"], ["fat", "--help"], [], ["--seed", "fat"], ["--print_config"]])
def test_an_unknown_or_missing_command_is_answered_with_the_names_of_all(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    if arguments[:1] != ["--seed"]:  # an unknown option is told before a command is looked for
        assert line.endswith(f"the commands are {', '.join(COMMANDS)}")


def test_a_command_after_options_is_told_where_to_be(capsys):
    Path("seed.yaml").write_text("seed_everything: 0\n")
    for command, expected in (("segments", "segments: write the command first"), ("fat", ", ".join(COMMANDS))):
        with pytest.raises(SystemExit):
            main(["--config", "seed.yaml", command])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMON_SETTINGS))
def test_the_help_of_lightnings_commands_opens_with_the_settings_that_most_runs_change(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    head, all_settings = shown.split("all settings:")
    assert len(head.splitlines()) <= 45
    for setting in COMMON_SETTINGS[command]:
        assert re.search(rf"^  --{re.escape(setting.name)}  +\S", head, re.MULTILINE), setting.name
        assert f"--{setting.name} " in all_settings, setting.name
    assert "--model.max_response_tokens  4096 " in head
    assert "COMMAND" not in head


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (["plan"], ["--questions", "--samples", "--kept_shares", "--out"]),
        (["segments"], ["--out", "--model.points", "--similarity"]),
        (["cache"], list(CACHE_COMMANDS)),
        (["cache", "build"], ["--out", "--keep_unfinished"]),
        (["cache", "import"], ["--response_column"]),
        (["cache", "export"], ["--path   *\\(required\\)"]),
        (["memory"], ["--gpu_memory_gib"]),
    ],
)
def test_the_help_of_other_commands_is_short_and_names_their_own_settings(command, own, capsys):
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 30
    assert COMMANDS.get(command[-1], CACHE_COMMANDS.get(command[-1])) in " ".join(shown.split())
    for name in own:
        assert re.search(rf"^  {name}\b" if name[-1].isalpha() else rf"^  {name}", shown, re.MULTILINE), name


def test_a_run_says_what_it_does_and_no_library_says_more():
    code = "print(sorted(m for m in ('bitsandbytes', 'deepspeed', 'peft', 'vllm') if m in sys.modules))"
    done = run("fit", *SMALL, "--ckpt_path", "last", code=code)
    assert unexpected(done.stderr) == []
    assert done.stdout.splitlines()[-1] == "[]"
    # Lightning's own warning of a checkpoint that is not there is not needed beside ours.
    assert done.stderr.count("there is none yet") == 1
    resumed = run("fit", *SMALL, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert unexpected(resumed.stderr) == []
    assert "saved the policy to" in resumed.stderr
    assert resumed.stderr.count("Seed set to 0") == 1


@pytest.mark.parametrize("command", [["fit"], ["cache", "build"]])
def test_an_adapter_and_other_commands_are_as_quiet(command):
    pytest.importorskip("peft")
    done = run(*command, *SMALL, "--model.adapter", "LoRA")
    assert (done.returncode, unexpected(done.stderr)) == (0, [])


def screen_of(columns: int, *arguments: str) -> str:
    """What a terminal of that width receives from the command line."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "rpo_lightning", *arguments]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal) as process:
        os.close(terminal)
        parts = []
        try:
            while part := os.read(controller, 65536):
                parts.append(part)
        except OSError:  # the other end is closed
            pass
    os.close(controller)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode())


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_fits_on_a_line_of_the_terminal_and_is_closed_before_the_summary(columns):
    screen = screen_of(columns, "fit", *SMALL)
    drawn = [line.strip() for line in re.split(r"[\r\n]", screen)]
    bars = [line for line in drawn if re.match(r"training|validating", line)]
    assert max(map(len, bars)) <= columns
    (last,) = {line for line in bars if line.startswith("training 2/2")} & {drawn[drawn.index(bars[-1])]}
    assert re.search(r"reward=\S+, accuracy=\S+, tokens/s=\S+$", last)
    assert "accuracy=" in next(line for line in bars if line.startswith("training 0/2"))  # measured before training
    for noise in ("Epoch", "v_num", "rollout/", "DataLoader", "💡"):
        assert noise not in screen
    after = screen[screen.index("saved the policy") :]
    assert "held-out accuracy" in after
    assert "training" not in after
    assert "validating" not in after
    metrics = pd.read_csv("runs/quickstart/version_0/metrics.csv")
    assert {"reward/mean", "rollout/tokens_per_second", "val/accuracy"} <= set(metrics.columns)


def test_a_bar_of_the_users_own_stays(capsys):
    main(["fit", *SMALL, "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "true",
          "--trainer.callbacks", "TQDMProgressBar"])  # fmt: skip
    assert "Epoch 0" in capsys.readouterr().out
    main(["fit", *SMALL, "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "true"])
    assert "Epoch 0" not in capsys.readouterr().out


def test_output_that_is_no_terminal_gets_lines_with_updates_and_figures(monkeypatch, caplog):
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", logger=progress_lines.__name__):
        main(["fit", *SMALL])
    lines = caplog.messages
    figures = r"reward [\d.]+, (accuracy [\d.]+, )?tokens/s [\d.]+k?"
    assert [line for line in lines if re.fullmatch(rf"training, update 1/2, {figures}", line)]
    assert [line for line in lines if re.fullmatch(rf"training, update 2/2, {figures}", line)]
    assert [line for line in lines if line.startswith("validating, batch 1")]


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("filling the cache", ["fit", *SMALL, "--cache.initialisation", "eager"]),
        ("cache build", ["cache", "build", *SMALL]),
    ],
)
def test_long_tasks_besides_training_give_lines_too(task, arguments, monkeypatch, caplog):
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", logger=progress_lines.__name__):
        main(arguments)
    assert [line for line in caplog.messages if re.fullmatch(rf"{task}, question 8/8, tokens/s \d+", line)]


def test_lines_of_progress_are_a_minute_apart(tmp_path, monkeypatch, caplog):
    seconds = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    lines = ProgressLinesCallback()
    with caplog.at_level("INFO", logger=progress_lines.__name__):
        for step in range(1, 7):  # after 25, 50, 75 … seconds
            lines.on_train_batch_end(SimpleNamespace(
                max_steps=9, global_step=step, is_global_zero=True, progress_bar_metrics={}), None)  # fmt: skip
    assert caplog.messages == ["training, update 3/9", "training, update 6/9"]


def test_a_run_of_epochs_names_the_epoch_and_its_last(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=2, enable_progress_bar=True, callbacks=[RunProgressBar()])
    trainer.fit(make_module(), make_data(train=make_data().sources["train"], batch_size=8))
    shown = capsys.readouterr().out
    assert "epoch 1/2 2/2 |" in shown
    assert "epoch 2/2 2/2 |" in shown


def test_the_bar_is_closed_when_training_fails(tmp_path, monkeypatch, capsys):
    bar = RunProgressBar()
    trainer = make_trainer(tmp_path, enable_progress_bar=True, callbacks=[bar])
    module = make_module()
    monkeypatch.setattr(module, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, make_data())
    assert bar.train_progress_bar.disable
    assert capsys.readouterr().out.endswith("\n")
    assert isinstance(bar, TQDMProgressBar)


def test_only_the_warnings_that_are_listed_are_silenced():
    for warning in HARMLESS_WARNINGS:
        assert len(warning.message) > 10
        assert len(warning.module) > 5
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_libraries()
        for message in ("The 'train_dataloader' does not have many workers", "Something else"):
            for module in ("lightning.pytorch.trainer", "elsewhere"):
                warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    assert [str(w.message) for w in shown] == [
        "The 'train_dataloader' does not have many workers",
        *["Something else"] * 2,
    ]


def test_a_reader_that_goes_away_is_no_error():
    """As in ``rpo-lightning --help | head``."""
    command = f"{sys.executable} -m rpo_lightning --help | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(3):  # the reader may be gone before or after the text is written
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.stderr, done.returncode) in (("", 0), ("", 1))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "rpo_lightning", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 1)


BREAKS_ANOTHER_PIPE = """
import os
from lightning.pytorch import Callback

class ToNobody(Callback):
    def setup(self, trainer, pl_module, stage):
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"text")
"""


def test_a_broken_pipe_that_is_not_stdouts_is_told(monkeypatch, capfd):
    Path("breaks_a_pipe.py").write_text(BREAKS_ANOTHER_PIPE)
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(BrokenPipeError):
        main(["fit", *SMALL, "--trainer.callbacks", "breaks_a_pipe.ToNobody"])
    print("after", flush=True)
    assert capfd.readouterr().out.splitlines()[-1] == "after"  # stdout still writes where it did
