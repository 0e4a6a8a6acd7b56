"""The quickstart keeps its promise (minutes: run by ``make test-slow``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpo_lightning.cli.main import main


@pytest.mark.slow
def test_the_quickstart_learns_with_fewer_tokens_than_the_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")])
    summary = json.loads((tmp_path / "runs" / "quickstart" / "version_0" / "summary.json").read_text())
    assert summary["updates"] <= 40
    assert 0.28 < summary["accuracy_before"] < 0.45
    assert summary["accuracy_after"] >= 0.65
    assert summary["decoded_tokens_per_sample"] <= 0.8 * summary["full_path_tokens_per_sample"]
