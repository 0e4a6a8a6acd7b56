"""The benchmarks run and end in JSON with the figures that are compared (minutes: run by ``make test-slow``).

No figure is checked that depends on the machine.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REASONER

ROOT = Path(__file__).parents[2]


def last_line(folder: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What a script says at its end, called from another folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # this tree's package
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in record["hardware"]
    return record


@pytest.mark.slow
def test_the_update_benchmark_compares_shared_rows_with_plain_ones(tmp_path):
    out = tmp_path / "update_phase.json"
    record = last_line(
        tmp_path, "update_phase.py", "--quick", "--model", "random:qwen2-tiny", "--dtype", "float32", "--out", str(out)
    )
    assert not out.exists()  # a quick run replaces no figures
    found = [(cell["prefix"], cell["suffix"], cell["group"]) for cell in record["cells"]]
    assert found == [(0, 64, 6), (256, 64, 6), (1024, 64, 6)]
    for cell in (*record["cells"], *record["reasoner_cells"]):
        assert math.isfinite(cell["time_ratio"])
        assert cell["time_ratio"] > 0
        # A small cell may stay within memory that the process holds already.
        assert math.isfinite(cell["memory_ratio"])
        assert cell["memory_ratio"] >= 0
        # Contexts are a prompt of 32 tokens and the prefix.
        context, suffix, group = 32 + cell["prefix"], cell["suffix"], cell["group"]
        assert cell["token_ratio"] == pytest.approx(group * (context + suffix) / (context + group * suffix))
        # To rounding in fp32; gradients relative to the largest.
        assert 0 <= cell["max_logprob_diff"] < 1e-3
        assert 0 <= cell["max_grad_diff"] < 1e-3


@pytest.mark.slow
def test_the_cost_model_predicts_the_papers_settings(tmp_path):
    record = last_line(tmp_path, "cost_model.py", "--quick")
    assert [gpu["name"] for gpu in record["gpus"]] == ["H20", "H100"]
    settings = {(row["model"], row["gpu"], row["gpus"], row["L"]) for row in record["predictions"]}
    assert len(settings) == len(record["predictions"]) == 2 * 2 * 2 * 3
    # Sharing rows can only help, and a shorter suffix too.
    assert all(row["rpo_seconds"] < row["rpo_plain_seconds"] < row["full_seconds"] for row in record["predictions"])
    assert all(row["full_over_rpo"] > row["full_over_rpo_plain_rows"] > 1 for row in record["one_gpu"])
    # Elementwise work moves bytes, so fused kernels leave products and attention as they are.
    for plain, fused in zip(record["update_shares"][::4], record["update_shares"][2::4], strict=True):
        assert fused["elementwise"] < plain["elementwise"]
        assert (fused["products"], fused["attention"]) == (plain["products"], plain["attention"])
    for change in record["expected"]:
        low, high = change["saved"]
        assert 0 <= low <= high
        assert high == pytest.approx(change["before"][1] - change["after"][1])


@pytest.mark.slow
def test_the_hosts_overhead_is_told_by_part(tmp_path):
    out = tmp_path / "host_overhead.json"
    record = last_line(tmp_path, "host_overhead.py", "--quick", "--model", REASONER, "--out", str(out))
    assert not out.exists()  # a quick run replaces no figures
    for arm in ("closed", "unclosed"):
        parts = record[arm]["parts"]
        assert all(math.isfinite(seconds) for seconds in parts.values())
        for part in ("cut and prefixes", "texts", "waiting for grading", "layout", "cache refresh", "logging"):
            assert parts[part] > 0, part
        # Decoding and the passes are told, and not counted.
        assert parts["decoding (pretended)"] >= 0.5
        hidden = ("decoding (pretended)", "forward and backward", "processor, trainer", "processor, workers")
        assert record[arm]["seconds"] == pytest.approx(sum(parts.values()) - sum(parts[name] for name in hidden))


@pytest.mark.slow
def test_hard_questions_charges_supervised_training_and_stops_at_its_tokens(tmp_path):
    arms = last_line(tmp_path, "hard_questions.py", "--quick")["levels"]["0.07"]
    assert list(arms) == ["full path", "supervised on foreign style, target success"]
    plain, supervised = arms.values()
    assert (plain["supervised_updates"], supervised["supervised_updates"]) == (0, 48)
    for arm in (plain, supervised):
        # An iteration of 128 responses of at most 160 tokens goes over the limit.
        assert 25_000 <= arm["decoded_tokens"] < 25_000 + 128 * 160
        assert 0 <= arm["accuracy"][0] <= arm["pass@8"][0] <= 1
    # 48 x 32 whole traces of some 130 tokens with their questions were processed before.
    assert supervised["processed_tokens"] - supervised["decoded_tokens"] > 48 * 32 * 120


@pytest.mark.slow
def test_the_left_out_benchmark_computes_no_more_tokens_than_with_all_responses(tmp_path):
    record = last_line(tmp_path, "left_out_responses.py", "--quick")
    assert 0 < record["ratios"]["update_tokens"][0] <= 1


@pytest.mark.slow
def test_the_selection_benchmark_compares_equally_many_updates(tmp_path):
    every, informative = last_line(tmp_path, "question_selection.py", "--quick")["arms"].values()
    assert every[0]["accuracy_before"] == informative[0]["accuracy_before"]
    # Two updates of 16 groups of 8; the orders of the questions differ, so the numbers of refills may.
    assert every[0]["samples"] >= 2 * 16 * 8
    assert informative[0]["samples"] >= 2 * 16 * 8
