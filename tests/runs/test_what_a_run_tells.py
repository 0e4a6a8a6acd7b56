"""A run tells which groups could teach, what its prefixes kept, and what it decoded for nothing."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rpo_lightning import ExperienceCacheCallback
from rpo_lightning.cache import AnchoredCut, CorrectMemberRefresh, write_cache
from rpo_lightning.callbacks import RunSummaryCallback
from rpo_lightning.rewards import LengthAwareAccuracyReward
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from tests.conftest import make_data, make_module, make_trainer


class GroupsOfEveryIteration(Callback):
    """Keeps what every iteration sampled."""

    def __init__(self):
        self.iterations = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.iterations.append(list(pl_module.groups))


@pytest.mark.parametrize("sampling", [None, DynamicSampling(max_refills=1)], ids=["plain", "dynamic"])
def test_metrics_and_summary_are_those_of_the_groups(tmp_path, sampling):
    cache = ExperienceCacheCallback(
        cut=AnchoredCut(0.6, 0.8, plain_share=0.3), refresh=CorrectMemberRefresh(), initialisation="lazy"
    )
    seen, summary = GroupsOfEveryIteration(), RunSummaryCallback()
    # Lengths make rewards of all-right groups differ: they teach, unless dynamic sampling drops them.
    module = make_module(rewards=[LengthAwareAccuracyReward()], dynamic_sampling=sampling)
    make_trainer(tmp_path, max_steps=6, callbacks=[cache, seen, summary]).fit(module, datamodule=make_data())
    log = pd.read_csv(tmp_path / "metrics.csv")
    rows = log[log["rollout/informative_share"].notna()]
    kept_shares, successes = [], []
    for groups, (_, row) in zip(seen.iterations, rows.iterrows(), strict=True):
        mixed = [g for g in groups if 0 < g.correct_count < len(g.samples)]
        assert row["rollout/informative_share"] == pytest.approx(len(mixed) / len(groups))
        kept_shares += [[len(g.request.prefix_ids) / g.request.cached_length for g in groups if g.request.prefix_ids]]
        successes += [[g.correct_count / len(g.samples) for g in groups if not g.request.prefix_ids]]
    # Logged once the cache has been refreshed.
    for name, of_iterations in (("cache/kept_share", kept_shares), ("cache/unprefixed_success", successes)):
        expected = [sum(values) / len(values) for values in of_iterations if values]
        assert len(expected) > 1
        assert log[name].dropna().tolist() == pytest.approx(expected)

    groups = [group for of_iteration in seen.iterations for group in of_iteration]
    taught = [g for g in groups if (0 < g.correct_count < len(g.samples) if sampling else g.has_variance)]
    decoded, useful = (sum(len(c.token_ids) for g in some for c in g.completions) for some in (groups, taught))
    assert 0 < useful < decoded
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["idle_decoding_share"] == pytest.approx(1 - useful / decoded)


def test_a_run_that_began_without_counting_idle_tokens_does_not_tell_their_share(tmp_path, capsys):
    def run(folder, steps, resume=None):
        summary, saver = RunSummaryCallback(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(tmp_path / folder, max_steps=steps, callbacks=[summary, saver])
        module = make_module(max_response_tokens=16)  # nothing is finished, so nothing is right
        trainer.fit(module, datamodule=make_data(), ckpt_path=resume, weights_only=True if resume else None)
        return summary, json.loads((tmp_path / folder / "summary.json").read_text())["idle_decoding_share"]

    summary, share = run("whole", 1)
    assert (summary.idle_tokens, share) == (summary.decoded_tokens, 1.0)
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    del checkpoint["callbacks"]["RunSummaryCallback"]["idle_tokens"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    capsys.readouterr()
    resumed, share = run("resumed", 2, tmp_path / "old.ckpt")
    assert resumed.decoded_tokens > summary.decoded_tokens
    assert (resumed.idle_tokens, resumed.state_dict()["idle_tokens"], share) == (None, None, None)
    assert re.search(r"decoding that taught nothing +not measured", capsys.readouterr().out)


def test_a_run_names_the_questions_that_it_answers_again_to_fill_its_cache(tmp_path, caplog):
    """Too short a limit leaves entries without a response, as a cache file of an earlier run may have them."""
    first = ExperienceCacheCallback()
    make_trainer(tmp_path / "first", max_steps=1, callbacks=[first]).fit(
        make_module(max_response_tokens=191), datamodule=make_data()
    )
    lacking = [entry.uid for entry in first.cache if not entry.has_anchor]
    assert 0 < len(lacking) < 16
    path = str(tmp_path / "start.parquet")
    write_cache(first.cache, path)
    again = ExperienceCacheCallback(path=path)
    caplog.clear()
    with caplog.at_level("INFO"):
        module, data = make_module(max_response_tokens=32), make_data()
        make_trainer(tmp_path / "again", max_steps=1, callbacks=[again]).fit(module, datamodule=data)
    (told,) = [line for line in caplog.messages if "answered again" in line]
    named = told.removeprefix(
        f"{path}: has no response to {len(lacking)} of its questions, which are answered again: "
    ).split(", ")
    assert set(named) - {"…"} <= set(lacking)
    assert len(named) == min(len(lacking), 6)
