"""Metrics equal hand-computed values, gold answers are read as published, and two ranks report what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch

from rpo_lightning.callbacks.evaluation_results import evaluation_table
from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.gold_answers import gold_answer
from rpo_lightning.data.prompts import LoadReport
from rpo_lightning.evaluation import AverageAtK, Estimate, Evaluation, MajorityAtK, PassAtK, QuestionMean
from rpo_lightning.evaluation.evaluation import average
from rpo_lightning.evaluation.metrics import bootstrap_means
from rpo_lightning.rewards import Grader, GradingPool, MathVerifier
from rpo_lightning.rewards.answers.extraction import marked_answer
from rpo_lightning.rewards.terms import AccuracyReward
from tests.conftest import REASONER, make_group

KEYS = torch.tensor([11, 22, 33])
# Right answers of five to each of three questions: 2, 0, 5.
CORRECT = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_avg_at_k_and_pass_at_k_equal_hand_computed_values():
    average_at_k = AverageAtK()
    average_at_k.update(KEYS, CORRECT)
    assert average_at_k.compute().item() == pytest.approx((2 / 5 + 0 + 1) / 3)
    for k, of_first in ((1, 2 / 5), (2, 1 - 3 / 10), (3, 1 - 1 / 10), (4, 1.0), (5, 1.0)):
        metric = PassAtK(k)
        metric.update(KEYS, CORRECT)
        assert metric.compute().item() == pytest.approx((of_first + 0 + 1) / 3), k


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(k):
    correct = torch.rand((4, 6), generator=torch.Generator().manual_seed(k)) < 0.4
    metric = PassAtK(k)
    metric.update(torch.arange(4), correct)
    chosen = [[any(row[i] for i in choice) for choice in combinations(range(6), k)] for row in correct.tolist()]
    assert metric.compute().item() == pytest.approx(sum(sum(c) / len(c) for c in chosen) / 4)


def test_pass_at_k_needs_k_answers():
    with pytest.raises(ConfigurationError, match="pass@6 needs at least 6 answers"):
        PassAtK(6).update(KEYS, CORRECT)


def test_majority_groups_equivalent_answers_and_counts_no_missing_ones():
    verifier = MathVerifier()
    responses = ["so \\boxed{1/2}", "$0.5$", "I get \\boxed{3}", "\\boxed{\\frac{2}{4}}", "no idea", "\\boxed{3}"]
    classes = verifier.answer_classes(*responses)
    assert classes == [0, 0, 1, 0, -1, 1]
    right = [bool(verifier.verify("", r, "0.5")) for r in responses]
    metric = MajorityAtK()
    tie = [[0, 1, 0, 1, -1, -1], [1, 0, 1, 0, 1, 1]]  # the missing answers would be right, and have no vote
    metric.update(torch.arange(4), torch.tensor([right, tie[1], [0] * 6, [1] * 6]),
                  torch.tensor([classes, tie[0], [-1] * 6, [0] * 6]))  # fmt: skip
    assert metric.values().tolist() == [1.0, 0.5, 0.0, 1.0]


def test_a_question_counts_once_however_often_samplers_repeat_it():
    metric = QuestionMean()
    metric.update(torch.tensor([5, 7]), torch.tensor([[1.0], [3.0]]))
    metric.update(torch.tensor([5, 5]), torch.tensor([[1.0], [1.0]]))
    assert metric.compute().item() == 2.0


def test_an_evaluation_reports_every_metric_with_an_interval_around_it():
    groups = [make_group([1, 0, 1, 0], uid=str(i), finished=[True, True, True, i > 1]) for i in range(4)]
    evaluation = Evaluation("set", n=4, votes=True, device=torch.device("cpu"))
    evaluation.add(groups[:2], [[0, 1, 0, 2]] * 2)
    evaluation.add(groups[2:], [[1, 0, 1, 0]] * 2)
    expected = {
        "accuracy": 0.5, "pass@2": 1 - 1 / 6, "pass@4": 1.0, "majority@4": 0.75, "response_tokens": 3.0,
        "truncated_share": 0.125,
    }  # fmt: skip
    assert evaluation.means() == pytest.approx(expected)
    estimates = evaluation.estimates()
    assert {k: e.value for k, e in estimates.items()} == pytest.approx(expected)
    majority = estimates["majority@4"]
    assert (majority.low, majority.high) == (0.5, 1.0)
    assert estimates["accuracy"].low == estimates["accuracy"].high == 0.5  # no question differs from another
    assert [row["answer_classes"] for row in evaluation.rows][:1] == [[0, 1, 0, 2]]


def test_bootstrap_intervals_are_those_of_the_normal_law_where_it_holds():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double()
    estimate = Estimate.of(values.mean().item(), bootstrap_means(values, resamples=4000))
    half_width = 1.96 * values.std().item() / len(values) ** 0.5
    assert estimate.high - estimate.value == pytest.approx(half_width, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half_width, rel=0.1)


def test_the_interval_of_an_average_over_sets_does_not_cancel_their_noise():
    values = {"a": [0.0, 1.0] * 50, "b": [1.0, 0.0] * 50}
    estimates = {}
    for name, correct in values.items():
        evaluation = Evaluation(name, n=1, votes=False, device=torch.device("cpu"))
        evaluation.add([make_group([c], uid=f"{i:03d}") for i, c in enumerate(correct)])
        estimates[name] = evaluation.estimates()
    of_average = average(estimates)["accuracy"]
    expected = 2 * 1.96 * (0.25 / 100 / 2) ** 0.5  # independent sets
    assert of_average.high - of_average.low == pytest.approx(expected, rel=0.15)


def test_the_table_names_sets_their_mean_and_rows_that_were_not_scored():
    def estimate(value):
        return {"accuracy": Estimate.of(value, bootstrap_means(torch.tensor([value, value]).double()))}

    sets = {"a": estimate(0.25), "b": estimate(0.75)}
    assert average(sets)["accuracy"].value == 0.5
    unusable = ["a.jsonl, row 3: dropped, its gold answer is empty"]
    reports = {"a": LoadReport(unusable=unusable, overlong=5, duplicates=3), "b": LoadReport()}
    table = evaluation_table(sets, {"a": 2, "b": 2}, reports)
    assert "| a | 2 | 9 | 0.250 [0.250, 0.250] |" in table
    assert "| b | 2 | 0 | 0.750 [0.750, 0.750] |" in table
    assert "| average |  |  | 0.500 [0.500, 0.500] |" in table
    for message in (*unusable, "5 prompts over data.max_prompt_tokens", "3 repeated questions"):
        assert f"- {message}" in table


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (204, "204"),
        (27.0, "27"),
        (0.5, "0.5"),
        ("long way\n#### 1,234", "1234"),
        ("So $x=2$ and $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        (["3"], "3"),
        (["1", "2"], "1, 2"),
        ("(1,2)", "(1,2)"),
    ],
)
def test_gold_answers_are_read_in_the_shapes_they_are_published_in(value, expected):
    assert gold_answer(value) == expected
    assert gold_answer(value).tolerances == ()


def test_boxes_within_boxes():
    assert marked_answer("\\boxed{a} then \\boxed{\\frac{\\sqrt{2}}{3}}.") == "\\frac{\\sqrt{2}}{3}"
    assert marked_answer("\\boxed{never closed") is None
    assert marked_answer("none") is None


@pytest.mark.parametrize(
    ("gold", "tolerance", "response", "right"),
    [
        ("3.14", "1e-2", "\\boxed{3.145}", True),
        ("3.14", "1e-2", "\\boxed{3.16}", False),
        ("3.14", None, "\\boxed{3.145}", False),
        (["1.0", "2.0"], "0.1", "\\boxed{2.05, 0.95}", True),
        (["1.0", "2.0"], "0.1", "\\boxed{2.05}", False),
        (["1.0", "2.0"], "0.01,0.5", "\\boxed{1.0, 2.4}", True),
        (["1.0", "2.0"], "0.5,0.01", "\\boxed{1.0, 2.4}", False),
        ("5", None, "\\boxed{5 \\text{ km/h}}", True),
        ("2,3", None, "\\boxed{3, 2}", True),
        ("5", "0.5", "\\boxed{x}", False),
        (["1.0", "1.05"], "0.1", "\\boxed{1.0, 7}", False),  # one number cannot stand for two
        ("(1.0,2.0)", "0.1", "\\boxed{(1.05,2.0)}", True),
        ("(1.0,2.0)", "0.1", "\\boxed{(2.0,1.05)}", False),
        ("3.14", "1e-2", "\\boxed{x=3.145}", True),
        ("1,234", "5", "\\boxed{1236}", True),
        ("\\$5", None, "\\boxed{5}", True),
        ("4.5e33", None, "\\boxed{4.5 \\times 10^{33}}", True),
        (1e-05, None, "\\boxed{10^{-5}}", True),
    ],
)
def test_tolerances_units_and_several_answers(gold, tolerance, response, right):
    verifier = MathVerifier()
    answer = gold_answer(gold, tolerance)
    assert verifier.gold_problem(answer) is None
    assert bool(verifier.verify("", response, answer)) is right
    # The worker processes get it too.
    pool = GradingPool(workers=1)
    try:
        assert pool.numbers(verifier.verify, [("", response, answer)]) == [float(right)]
    finally:
        pool.close()


class SlowVerifier(MathVerifier):
    def final_answer(self, response):
        while response == "hang":
            pass
        return super().final_answer(response)


def test_answers_that_take_too_long_to_compare_have_no_vote():
    pool = GradingPool(workers=1, timeout_seconds=1.0)
    try:
        grader = Grader(SlowVerifier(), [AccuracyReward()], pool)
        groups = [[s for s in make_group([1, 1], uid=u).samples] for u in "ab"]
        texts = [["hang", "1"], ["\\boxed{1}", "1.0"]]
        groups = [[type(s)(**{**s.__dict__, "response": t}) for s, t in zip(g, ts, strict=True)]
                  for g, ts in zip(groups, texts, strict=True)]  # fmt: skip
        assert grader.answer_classes(groups) == [[-1, -1], [0, 0]]
    finally:
        pool.close()


SHAPES = {
    "problem_answer": [{"problem": "1a+1=", "answer": "2"}, {"problem": "1a+2=", "answer": 3}],
    "final_answer": [
        {"question": "1a+3=", "final_answer": ["4"], "unit": None, "error": None},
        {"question": "1a+4=", "final_answer": ["5", "6"], "is_multiple_answer": True, "unit": "m", "error": "1e-1"},
        {"question": "1a+5=", "final_answer": []},
        {"question": "1a+6=", "final_answer": ["7"], "error": "about"},
    ],
    "boxed": [{"problem": "1a+7=", "solution": "Clearly \\boxed{8}."}, {"problem": "1a+8=", "solution": None}],
    "floats": [{"question": "1a+9=", "answer": 10.0}],
    "gsm8k": [{"question": "2a+1=", "answer": "two and one\n#### 3"}],
}


@pytest.fixture
def _shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in SHAPES.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


EVALUATE = [
    "--model.policy", REASONER, "--model.rewards", '[{"class_path": "AccuracyReward"}]', "--model.max_response_tokens",
    "24", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
]  # fmt: skip


@pytest.mark.usefixtures("_shapes")
def test_the_command_line_evaluates_several_sets_and_lists_what_it_cannot_read(capsys):
    sets = json.dumps({name: f"{name}.jsonl" for name in SHAPES})
    main(
        ["test", *EVALUATE, "--model.verifier", "MathVerifier", "--model.evaluation.samples", "4", "--data.test", sets]
    )
    table, screen = Path("evaluation.md").read_text(), capsys.readouterr().out
    assert table in screen + "\n"
    assert "Test metric" not in screen  # one table, not Lightning's beside it
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert list(rows) == ["set", "---", *SHAPES, "average"]
    assert {"majority@4", "pass@2"} <= {cell.strip() for cell in rows["set"].split("|")}
    assert rows["final_answer"].startswith("| final_answer | 2 | 2 |")
    assert rows["boxed"].startswith("| boxed | 1 | 1 |")
    assert "final_answer.jsonl, row 3: dropped, its gold answer is empty" in table
    assert "final_answer.jsonl, row 4: dropped, its error 'about' is no tolerance" in table
    assert "boxed.jsonl, row 2: dropped, its gold answer is empty" in table
    results = pd.read_parquet("evaluation.parquet")
    assert results["set"].value_counts().to_dict() == {
        "problem_answer": 2, "final_answer": 2, "boxed": 1, "floats": 1, "gsm8k": 1,
    }  # fmt: skip
    assert (results["responses"].map(len) == 4).all()
    assert dict(zip(results["question"], results["gold_answer"], strict=True))["1a+4="] == "5, 6"


@pytest.mark.usefixtures("_shapes")
def test_greedy_answers_give_the_same_table_on_one_rank_and_on_two():
    Path("sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}a+1b*2=", "answer": f"{(i + 1) * 2}"}) + "\n" for i in range(5))
    )
    settings = [*EVALUATE, "--model.verifier", "ExactMatchVerifier", "--model.evaluation.sampling.temperature", "0",
                "--data.test", "sums.jsonl", "--data.eval_batch_size", "2"]  # fmt: skip
    tables = []
    for devices in (1, 2):
        command = [sys.executable, "-m", "rpo_lightning", "test", *settings, "--trainer.devices", str(devices)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "%|" not in done.stdout + done.stderr  # no bars where there is no terminal
        tables.append(Path("evaluation.md").read_text())
        assert len(pd.read_parquet("evaluation.parquet")) == 5
    assert "| all | 5 | 0 |" in tables[0]
    assert tables[0] == tables[1]
