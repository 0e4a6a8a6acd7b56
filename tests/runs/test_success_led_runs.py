"""Runs whose cuts follow success, with several anchors a question and traces from elsewhere, through the real path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache import AnchorsRefresh, BisectionCut, TargetSuccessCut, read_cache
from rpo_lightning.callbacks import RunSummaryCallback
from rpo_lightning.cli.main import main
from rpo_lightning.data.arithmetic import draw_problem
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from tests.conftest import cache_contents, make_data, make_module, make_trainer
from tests.runs.test_runs_on_ranks import fit, records

ROOT = Path(__file__).parents[2]
CUTS = {
    "target": lambda: TargetSuccessCut(plain_share=0.25, failing_prefixes=True),
    "bisection": lambda: BisectionCut(plain_share=0.25),
}


def success_led_run(folder, cut, stop: int, resume=None):
    """Epochs of four batches; every question has been cut when the run ends."""
    cache = ExperienceCacheCallback(cut=CUTS[cut](), refresh=AnchorsRefresh(2, 1), initialisation="lazy")
    module = make_module()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    summary = RunSummaryCallback()
    trainer = make_trainer(folder, max_steps=stop, callbacks=[cache, summary, checkpoint])
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume, weights_only=True if resume else None)
    return module, cache, summary


@pytest.mark.parametrize("cut", CUTS)
def test_a_resumed_run_goes_on_with_its_anchors_and_its_predictor_exactly(tmp_path, cut):
    whole, cache, summary = success_led_run(tmp_path / "whole", cut, stop=9)
    resumed, resumed_cache, resumed_summary = success_led_run(
        tmp_path / "resumed", cut, stop=9, resume=tmp_path / "whole" / "step=5.ckpt"
    )
    assert cache_contents(resumed_cache.cache) == cache_contents(cache.cache)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed_summary.idle_tokens == summary.idle_tokens
    assert any(len(entry.anchors) == 3 for entry in cache.cache)
    assert any(group.request.prefix_ids for group in whole.groups)
    assert cache.cache.shared.keys() == {"success" if cut == "target" else "bisection"}
    assert cache_contents(
        read_cache(tmp_path / "whole" / "cache.parquet", tokenizer_fingerprint(whole.tokenizer))
    ) == cache_contents(cache.cache)


def test_a_run_starts_from_traces_and_prefers_its_own_correct_responses(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.train.size", "8", "--data.val.size", "3",
        "--data.batch_size", "8", "--model.group_size", "4", "--model.max_response_tokens", "256",
        "--cache.refresh", "AnchorsRefresh", "--cache.refresh.correct", "1", "--cache.refresh.wrong", "0",
        "--cache.cut", "TargetSuccessCut", "--cache.cut.plain_share", "0.5",
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    problems = [draw_problem(rng, 24) for _ in range(8)]  # those of the config's ArithmeticChain
    rows = [
        {"problem": problem.question, "solution": solution}
        for problem in problems
        for solution in (problem.solution(), f"{problem.solution()}0")
    ]
    Path("traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["cache", "import", *small, "--path", "traces.jsonl", "--response_column", "solution",
          "--only_correct", "true", "--out", "traces.parquet"])  # fmt: skip
    assert "16 rows used, 8 of them right" in capsys.readouterr().out
    traces = read_cache("traces.parquet", tokenizer_fingerprint(tokenizer))
    assert [[a.is_trace for a in e.anchors] for e in traces] == [[True]] * 8

    main(["fit", *small, "--cache.path", "traces.parquet", "--trainer.max_steps", "3",
          "--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false"])  # fmt: skip
    run = Path("runs/quickstart/version_0")
    log = pd.read_csv(run / "metrics.csv")
    assert 0 < log["rollout/full_path_share"].dropna().iloc[0] < 1  # prefixes from the first visit on
    cache = read_cache(run / "cache.parquet", tokenizer_fingerprint(tokenizer))
    anchors = [anchor for entry in cache for anchor in entry.anchors]
    assert len(anchors) == 8
    assert any(anchor.is_own for anchor in anchors)
    assert all(anchor.correct for anchor in anchors)


@pytest.mark.slow
def test_two_ranks_share_anchors_and_predictor_and_a_killed_run_resumes_exactly(tmp_path):
    settings = [
        "--cache.cut=TargetSuccessCut", "--cache.cut.plain_share=0.2", "--cache.cut.failing_prefixes=true",
        "--cache.refresh=AnchorsRefresh", "--cache.refresh.correct=2", "--cache.refresh.wrong=1",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(whole, "ddp", "transformers", ranks=2, settings=settings)
    of_ranks = [records(whole / "on-2", rank) for rank in (0, 1)]
    assert [r["cache"] for r in of_ranks[0]] == [r["cache"] for r in of_ranks[1]]
    assert len({r["cache"] for r in of_ranks[0]}) == 5
    assert any(kept > 0 for rank in of_ranks for r in rank for kept in r["kept"])
    assert fit(killed, "ddp", "transformers", ranks=2, kill_after=2, settings=settings) != 0
    (checkpoint,) = killed.glob("runs-2/quickstart/version_0/checkpoints/step=2.ckpt")
    fit(killed, "ddp", "transformers", ranks=2, resume=str(checkpoint), settings=settings)
    for rank, uninterrupted in enumerate(of_ranks):
        assert records(killed / "on-2-resumed", rank)[1:] == uninterrupted[3:]
