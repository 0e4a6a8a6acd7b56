"""Adapters and the scripts: what bitsandbytes says at every product or import is not printed over and over."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from rpo_lightning.cli.quiet import Once

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TINY = [
    "fit", "--config", str(CONFIG), "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
    "--data.train.size", "4", "--data.val.size", "4", "--data.batch_size", "2", "--model.group_size", "2",
    "--model.max_response_tokens", "64", "--model.adapter", "LoRA",
]  # fmt: skip


def told(arguments: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_an_8_bit_policy_tells_once_at_most_that_products_are_cast(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    printed = told(["rpo_lightning", *TINY, "--model.adapter.quantization", "8bit"], tmp_path)
    assert "held-out accuracy" in printed
    assert printed.count("inputs will be cast") <= 1
    assert "gemm_4bit_forward" not in printed


def test_a_plain_adapter_and_a_schedule_say_nothing_of_quantised_products(tmp_path):
    pytest.importorskip("peft")
    printed = told(["rpo_lightning", *TINY, "--model.lr_schedule.name", "linear"], tmp_path)
    assert "held-out accuracy" in printed
    assert "gemm_4bit_forward" not in printed
    assert "inputs will be cast" not in printed


def test_importing_the_scripts_imports_no_bitsandbytes(tmp_path):
    modules = "rpo_lightning.cli.scripts.make_reasoner, rpo_lightning.rollout.vllm.install_cpu"
    code = f"import sys, {modules}; print([m for m in ('bitsandbytes', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_another_message_of_the_same_logger_is_shown(caplog):
    log = logging.getLogger("of a test")
    once = Once()
    log.addFilter(once)
    try:
        for kind in ("float32", "bfloat16"):
            log.warning("cast from %s", kind)
        log.warning("another")
    finally:
        log.removeFilter(once)
    assert caplog.messages == ["cast from float32", "another"]
