"""Segments, cache commands and reports, through the command line."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.parquet import read_cache
from rpo_lightning.cli.main import main
from rpo_lightning.cli.report.report import PANELS, draw
from rpo_lightning.cli.segments.results import similarities
from rpo_lightning.cli.segments.similarity import EmbeddingSimilarity, TfidfSimilarity
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.arithmetic import ArithmeticChain, ArithmeticProblem
from rpo_lightning.policy.export import save_policy
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import load_tokenizer, tokenizer_fingerprint
from rpo_lightning.rewards import UniformRandomReward
from tests.conftest import REASONER, make_data, make_module, make_trainer

ROOT = Path(__file__).parents[2]
QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
SMALL = [*QUICKSTART, "--data.train.size", "6", "--data.val.size", "3", "--model.max_response_tokens", "256"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load_cache(path, tokenizer) -> ExperienceCache:
    cache = ExperienceCache(tokenizer_fingerprint(tokenizer))
    cache = read_cache(path, cache.tokenizer_fingerprint)
    return cache


def test_segments_cut_a_first_answer_at_a_grid_and_continue_each_cut(tokenizer):
    main(["segments", *SMALL, "--model.continuations", "3", "--model.points", "4", "--out", "parts"])
    rows = pd.read_parquet("parts/segments.parquet")
    assert Path("parts/segments.png").stat().st_size > 10_000
    assert rows["uid"].nunique() == 3
    for _, of_question in rows.groupby("uid"):
        of_question = of_question.sort_values("kept")
        length = of_question["first_tokens"].iloc[0]
        assert of_question["share"].tolist() == [0, 0.25, 0.5, 0.75, 1.0]
        assert of_question["kept"].tolist() == [round(length * s) for s in (0, 0.25, 0.5, 0.75, 1)]
        assert (of_question["cut"] == length - of_question["kept"]).all()
        assert of_question["correct"].map(len).tolist() == [3, 3, 3, 3, 1]
        assert of_question["correct"].iloc[-1][0] == of_question["first_correct"].iloc[0]
        # Prefixes of the three answers from scratch, at four steps of the shortest.
        answers = of_question["answers"].iloc[0]
        assert [len(a) for a in answers] == [4, 4, 4]
        for prefixes in answers:
            assert all(b.startswith(a) and len(b) > len(a) for a, b in pairwise(prefixes))
        assert len({len(prefixes[1]) for prefixes in answers}) == 1  # a character a token: equally long


def test_continuations_of_a_right_answer_are_right_when_all_but_its_end_is_kept():
    # The embedded reasoner can do every step, so what it decides is whether to leave one out.
    main(["segments", *SMALL, "--model.continuations", "8", "--model.points", "4", "--data.val.size", "12"])
    rows = pd.read_parquet("segments/segments.parquet")
    late = rows[(rows["share"] == 0.75) & rows["first_correct"]]
    early = rows[(rows["share"] == 0.0) & rows["first_correct"]]
    assert len(late) >= 3
    assert late["correct"].map(np.mean).mean() > early["correct"].map(np.mean).mean()


def test_similarity_is_one_for_equal_texts_and_falls_with_what_differs():
    measure = TfidfSimilarity(longest=2)
    assert measure.mean_of_pairs(["abcabc", "abcabc"]) == pytest.approx(1.0)
    near, far = measure.mean_of_pairs(["abcabc", "abcabd"]), measure.mean_of_pairs(["abcabc", "xyzxyz"])
    assert far == pytest.approx(0.0)
    assert 0.1 < near < 0.99
    rows = [{"answers": [["ab", "abcd"], ["ab", "abxy"]]}]
    first, second = similarities(rows, TfidfSimilarity())[0]
    assert first == pytest.approx(1.0)
    assert second < 1.0
    with pytest.raises(ConfigurationError, match="at least two"):
        measure.mean_of_pairs(["one"])


def test_similarity_by_an_embedding_model(tmp_path):
    save_policy(load_policy(REASONER), load_tokenizer(REASONER), tmp_path / "model")
    measure = EmbeddingSimilarity(str(tmp_path / "model"), batch_size=2)
    vectors = measure.embed(["1a+1=", "2b*3=", "1a+1="])
    np.testing.assert_allclose((vectors**2).sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert vectors[0] @ vectors[1] < 1 - 1e-4
    with pytest.raises(ConfigurationError, match="no model found there"):
        EmbeddingSimilarity("./nowhere").embed(["a"])


def test_a_cache_built_with_one_model_starts_the_training_of_another(tokenizer, tmp_path, capsys):
    """The paper's appendix C."""
    main(["cache", "build", *SMALL, "--cache.initial_samples", "4", "--out", "large.parquet"])
    assert "large.parquet: 6 questions, 6 with a response" in capsys.readouterr().out
    built = load_cache("large.parquet", tokenizer)
    assert sum(e.response.correct for e in built) >= 3  # the best of four
    other = load_policy(REASONER)
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    save_policy(other, tokenizer, tmp_path / "other")
    main(["fit", *SMALL, "--model.policy", str(tmp_path / "other"), "--cache.path", "large.parquet",
          "--cache.initialisation", "eager", "--trainer.max_steps", "1", "--data.batch_size", "6",
          "--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"])  # fmt: skip
    run = Path("runs/quickstart/version_0")
    metrics = pd.read_csv(run / "metrics.csv")
    correct = sum(e.response.correct for e in built)
    # Anchored cuts keep a part of every right response of the other model.
    assert metrics["rollout/full_path_share"].dropna().iloc[0] == pytest.approx(1 - correct / 6)
    assert json.loads((run / "summary.json").read_text())["initialisation_tokens"] == 0
    # What was not sampled in this run is told from what its starting policy sampled.
    spans = [span for e in load_cache(run / "cache.parquet", tokenizer) for span in e.response.spans]
    assert {step for step, _ in spans} == {-1, 0}


def test_entries_are_shown_with_what_a_cut_keeps_and_drops(tokenizer, capsys):
    main(["cache", "build", *SMALL, "--out", "cache.parquet"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["cache", "build", *SMALL, "--model.max_response_tokens", "5", "--out", "nothing.parquet"])
    assert "none of 6 questions has an answer that ended" in capsys.readouterr().err
    assert not Path("nothing.parquet").exists()
    with pytest.raises(SystemExit):
        main(["cache", "list"])
    assert "cache list: no such command" in capsys.readouterr().err
    main(["cache", "show", "--path", "cache.parquet", "--tokenizer", REASONER, "--entries", "2",
          "--cut", "AnchoredCut", "--cut.low", "0.5", "--cut.high", "0.5"])  # fmt: skip
    shown = capsys.readouterr().out
    cache = load_cache("cache.parquet", tokenizer)
    assert shown.count("question ") == 2
    for entry in list(cache)[:2]:
        text = tokenizer.decode(entry.response.token_ids, skip_special_tokens=True)
        kept = len(entry.response) // 2 if entry.response.correct else 0
        assert re.search(
            rf"prefix \({kept}\): +{re.escape(text[:kept])}\n +dropped \(\d+\): +{re.escape(text[kept:])}\n", shown
        )
    main(["cache", "stats", "--path", "cache.parquet", "--tokenizer", REASONER])
    stats = capsys.readouterr().out
    share = sum(e.response.correct for e in cache) / len(cache)
    assert f"right                 {share:.1%}" in stats
    assert "100.0% by the starting policy" in stats
    openings = len({tuple(e.response.token_ids[:16].tolist()) for e in cache})
    assert f"distinct openings     {openings} of 6" in stats


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["import", "--path", "owner/traces"], "owner/traces is read as a Hugging Face data set"),
        (["export", "--path", "c.parquet", "--out", "rows"], "rows is a folder, not a .parquet or .jsonl file"),
    ],
)
def test_a_package_that_is_not_installed_is_told_with_the_extra_that_has_it(arguments, what, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not there
    with pytest.raises(SystemExit):
        main(["cache", arguments[0], *SMALL, *arguments[1:]])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "datasets" in line]
    assert line == f"rpo-lightning: error: {what}: datasets is not installed: pip install 'rpo-lightning[hub]'"


@pytest.mark.parametrize("out", ["texts.parquet", "texts.jsonl", "texts"])
def test_an_exported_cache_is_readable_and_imports_without_drift(tokenizer, out, capsys):
    main(["cache", "build", *SMALL, "--out", "cache.parquet"])
    main(["cache", "export", *SMALL, "--path", "cache.parquet", "--out", out])
    from datasets import load_from_disk

    rows = load_from_disk(out).to_pandas() if out == "texts" else (
        pd.read_parquet(out) if out.endswith("parquet") else pd.read_json(out, lines=True, dtype={"answer": str})
    )  # fmt: skip
    questions = {r["question"]: r["answer"] for r in ArithmeticChain(6, seed=1).rows()}
    assert dict(zip(rows["question"], rows["answer"], strict=True)) == questions
    if out == "texts":
        rows.to_parquet("again.parquet")
        out = "again.parquet"
    main(["cache", "import", *SMALL, "--path", out, "--out", "second.parquet"])
    assert "; left out: 0 about no training question, 0 over model.max_response_tokens=256" in capsys.readouterr().out
    first, second = (load_cache(p, tokenizer) for p in ("cache.parquet", "second.parquet"))
    for entry in first:
        other = second.get(entry.uid).response
        assert other.token_ids.tolist() == entry.response.token_ids.tolist()
        assert (other.correct, other.reward) == (entry.response.correct, entry.response.reward)
        assert other.spans == ((-1, len(other)),)


def test_teacher_traces_become_a_cache(tokenizer, capsys):
    data = make_data(train=ArithmeticChain(6, seed=1))
    rows = [
        {"problem": row["question"], "solution": trace}
        for row in ArithmeticChain(6, seed=1).rows()
        for trace in (f"#{row['answer']}", "#wrong")
    ]
    rows.append({"problem": "unknown", "solution": "#1"})
    rows.append({"problem": rows[0]["problem"], "solution": "1" * 300})
    Path("traces.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    main(["cache", "import", *SMALL, "--path", "traces.jsonl", "--response_column", "solution"])
    assert "12 rows used, 6 of them right; left out: 1 about no training question, 1 over" in capsys.readouterr().out
    cache = load_cache("cache.parquet", tokenizer)
    module = make_module()
    prompts = data.read("train", "", module.tokenizer, module.grader.verifier)
    for prompt in prompts:
        response = cache.get(prompt.uid).response
        assert response.correct and response.finished  # noqa: PT018 (the right one of the two, with its end)
        assert tokenizer.decode(response.token_ids) == f"#{prompt.answer}$"


def test_what_does_not_belong_is_refused_with_one_line(tokenizer, tmp_path, capsys):
    main(["cache", "build", *SMALL, "--out", "cache.parquet"])
    main(["cache", "export", *SMALL, "--path", "cache.parquet", "--out", "texts.parquet"])
    longer = load_tokenizer(REASONER)
    longer.add_tokens(["@"])
    save_policy(load_policy(REASONER), longer, tmp_path / "foreign")
    drifted = pd.read_parquet("texts.parquet")
    drifted["token_ids"] = drifted["token_ids"].map(lambda ids: [*ids[1:], 7])
    drifted.to_parquet("drifted.parquet")
    fit = ["fit", *SMALL, "--trainer.max_steps", "1", "--data.batch_size", "4"]
    for command, message in (
        ([*fit, "--model.policy", str(tmp_path / "foreign"), "--cache.path", "cache.parquet"],
         "made with another tokenizer"),
        (["cache", "stats", "--path", "cache.parquet", "--tokenizer", str(tmp_path / "foreign")],
         "made with another tokenizer"),
        (["cache", "show", "--path", "cache.parquet", "--tokenizer", REASONER, "--uid", "none"],
         "no response for question 'none'"),
        (["cache", "export", *SMALL, "--path", "cache.parquet", "--out", "texts.csv"],
         "texts.csv: tables are written as .parquet or .jsonl"),
        (["cache", "import", *SMALL, "--path", "drifted.parquet"], "row 1: its token ids are not this tokenizer's"),
        (["cache", "import", *SMALL, "--path", "texts.parquet", "--response_column", "no", "--data.train.seed", "9"],
         "none of its rows is about one of the 6 training questions"),
        (["report", "nowhere"], "nowhere: holds no metrics.csv"),
    ):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(command)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpo-lightning: error:")]
        assert ended.value.code == 2
        assert len(error) == 1
        assert message in error[0]


def test_a_report_holds_the_run_in_one_file(tmp_path):
    main(["fit", *SMALL, "--trainer.max_steps", "3", "--data.batch_size", "3", "--trainer.enable_progress_bar", "false",
          "--trainer.val_check_interval", "1"])  # fmt: skip
    run = Path("runs/quickstart/version_0")
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['accuracy_before']:.3f} before" in page
    assert f"{summary['total_tokens']:,}, of which" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(titles) == page.count("data:image/png;base64,") == 7
    assert any("phase" in t for t in titles)
    completion = json.loads((run / "completions.jsonl").read_text().splitlines()[-1])
    assert f'<span class="suffix">{completion["suffix"]}</span>' in page


def test_pictures_are_over_iterations_however_many_updates_each_makes(tmp_path, monkeypatch):
    module = make_module(rewards=[UniformRandomReward()], max_response_tokens=8, minibatches_per_pass=2)
    make_trainer(tmp_path, max_steps=6).fit(module, datamodule=make_data())
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(pd.read_csv(tmp_path / "metrics.csv"), PANELS[1])
    (axis,) = figures[0].axes
    assert axis.get_xlabel() == "iterations"
    assert axis.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert module.global_step == 6


def test_predict_answers_without_a_prefix_even_for_analysis(tmp_path):
    # The plain predict of the same module class is not disturbed by what analysis added.
    module = make_module(max_response_tokens=48)
    data = make_data(predict=ArithmeticChain(2, 3, seed=5))
    make_trainer(tmp_path).predict(module, datamodule=data)
    assert [g.request.prefix_ids for g in module.answered] == [(), ()]


def test_a_problem_may_have_more_steps_than_there_are_letters():
    problem = ArithmeticProblem(1, (("+", 1),) * 60)
    assert problem.question.count("+1") == 60
    assert problem.answer == "61"
