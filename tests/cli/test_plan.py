"""``rpo-lightning plan``, through the command line: estimates, advice, and what it leaves alone."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.callbacks import experience_cache
from rpo_lightning.cli.main import main
from rpo_lightning.cli.plan import update
from rpo_lightning.cli.plan.estimates import (
    Answers,
    ArmEstimate,
    Iteration,
    UpdateSeconds,
    informative_probability,
)
from rpo_lightning.cli.plan.verdict import Advice, judge
from rpo_lightning.data.arithmetic import ArithmeticProblem, draw_problem
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.update.loss import PolicyLoss
from tests.conftest import REASONER

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.train.size", "6", "--data.batch_size", "3",
    "--model.group_size", "4", "--model.max_response_tokens", "256",
]  # fmt: skip
# The reasoner has never seen problems of eight steps, and solves none.
UNKNOWN = ["--data.train.operations", "8", "--model.max_response_tokens", "120"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str) -> dict:
    main(["plan", *SMALL, "--out", "plan.json", *arguments])
    return json.loads(Path("plan.json").read_text())


def arms_of(report: dict) -> dict[str, dict]:
    return {arm["arm"]: arm for arm in report["arms"]}


# -- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "size"), [(8, 2), (8, 4), (6, 6), (9, 3)])
def test_a_groups_probability_to_teach_is_counted_over_all_groups_that_can_be_drawn(samples, size):
    for correct in range(samples + 1):
        verdicts = [i < correct for i in range(samples)]
        groups = list(combinations(verdicts, size))
        counted = sum(any(g) and not all(g) for g in groups) / len(groups)
        assert informative_probability(correct, samples, size) == pytest.approx(counted)


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_it_is_right_on_average_over_samples(rate):
    samples, size = 8, 4
    outcomes = product([True, False], repeat=samples)
    weighted = [(math.prod(rate if v else 1 - rate for v in o), informative_probability(sum(o), samples, size))
                for o in outcomes]  # fmt: skip
    assert sum(w * x for w, x in weighted) == pytest.approx(1 - rate**size - (1 - rate) ** size)


def test_fewer_samples_than_a_group_use_the_success_rate():
    outcomes = product([True, False], repeat=6)
    counted = sum(0.25 ** sum(o) * 0.75 ** (6 - sum(o)) for o in outcomes if any(o) and not all(o))
    assert informative_probability(1, 4, 6) == pytest.approx(counted)


def test_the_table_is_computed_from_what_was_sampled(monkeypatch, capsys):
    sampled, modules = [], []
    roll_out = RPOModule.roll_out

    def recording(module, requests, *rest):
        groups = roll_out(module, requests, *rest)
        sampled.extend(groups)
        modules.append(module)
        return groups

    monkeypatch.setattr(RPOModule, "roll_out", recording)
    report = plan("--samples", "5", "--kept_shares", "[0.5]")
    printed = capsys.readouterr().out
    groups = [g for g in sampled[1:] if len(g.samples) == 5]  # after the one that starts the engine
    plain, kept, cut = groups[:6], groups[6:12], groups[12:]
    assert len(cut) == 6
    for name, of_arm in (("no prefix", plain), ("keep 0.5", kept), ("cut: AnchoredCut", cut)):
        verdicts = [[s.is_correct for s in g.samples] for g in of_arm]
        success = np.mean(verdicts)
        teach = np.mean([np.mean([len(set(g)) == 2 for g in combinations(v, 4)]) for v in verdicts])
        tokens = np.mean([[len(c.token_ids) for c in g.completions] for g in of_arm]) * 3 * 4
        arm = arms_of(report)[name]
        assert arm["success"]["value"] == pytest.approx(success)
        assert arm["informative_share"]["value"] == pytest.approx(teach)
        assert arm["decoded_tokens"]["value"] == pytest.approx(tokens)
        assert arm["tokens_per_informative_group"] == pytest.approx(tokens / (3 * teach))
        assert arm["seconds"]["value"] == pytest.approx(arm["rollout_seconds"]["value"] + arm["update_seconds"])
        for estimate in (arm["success"], arm["informative_share"], arm["decoded_tokens"]):
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert re.search(rf"^{name} +\d/6 +{success:.2f} \[.*\] +{teach:.2f} \[.*\] +{tokens:,.0f} \[", printed, re.M)
    responses = {g.request.prompt.uid: [g.response_ids(i) for i in range(5) if g.samples[i].is_correct] for g in plain}
    for g in kept:
        prefix, whole = g.request.prefix_ids, g.request.cached_length
        correct = [r for r in responses[g.request.prompt.uid] if len(r) == whole and r[: len(prefix)] == prefix]
        assert (len(prefix) == whole // 2 and correct) or (not prefix and not responses[g.request.prompt.uid])
    assert report["questions_with_own_correct_response"] == sum(bool(r) for r in responses.values())
    for name, of_arm in (("keep 0.5", kept), ("cut: AnchoredCut", cut)):
        again = [g.request.prompt.uid for g in of_arm if not g.request.prefix_ids]
        assert sorted(report["answered_again"][name]) == sorted(again)
        assert (f"{len(again)} in {name}" in printed) == bool(again)
    assert any(report["answered_again"].values())
    assert list(report["answered_again"]) == ["keep 0.5", "cut: AnchoredCut"]
    # The policy is as it was, and the run has left nothing behind but the file that was asked for.
    before = load_policy(REASONER).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in modules[0].policy.state_dict().items())
    assert all(p.grad is None for p in modules[0].policy.parameters())
    assert [path.name for path in Path().iterdir()] == ["plan.json"]
    assert set(report["sentences"]) <= set(printed.splitlines())


@pytest.mark.parametrize(("settings", "needs_old"), [([], False), (["--model.update.passes_per_rollout", "2"], True)])
def test_old_logprobs_of_every_group_are_timed_where_the_update_needs_them(settings, needs_old, monkeypatch, capsys):
    computed = []
    store = PolicyLoss.store_old_logprobs

    def counting(loss, groups):
        computed.append(sum(group.old_logprobs is None for group in groups))
        store(loss, groups)

    monkeypatch.setattr(PolicyLoss, "store_old_logprobs", counting)
    monkeypatch.setattr(update, "TIMED_GROUPS", 2)
    report = plan("--cache", "null", "--kept_shares", "[]", "--samples", "4", *settings)
    assert computed == ([1, 6] if needs_old else [])  # one to get ready, and all six that are timed
    arm = arms_of(report)["no prefix"]
    assert (arm["old_logprobs_seconds"] > 0) == needs_old == ("old log-probs of all groups" in capsys.readouterr().out)
    parts = arm["rollout_seconds"]["value"], arm["old_logprobs_seconds"], arm["update_seconds"]
    assert arm["seconds"]["value"] == pytest.approx(sum(parts))


def test_seconds_of_the_update_are_those_of_the_responses_that_are_trained_on():
    rows = [Answers("a", str(i), (i < 2, False), (10, 10), 0, 0, 1.0) for i in range(4)]  # half of the groups teach
    for drops, old, passes in ((False, 0.5 * 8, 2.0 * 8), (True, 0.5 * 4, 2.0 * 4)):
        iteration = Iteration(groups=8, group_size=2, ranks=2, drops_groups=drops)
        estimate = ArmEstimate.of(rows, iteration, UpdateSeconds(0.5, 2.0))
        assert (estimate.old_logprobs_seconds, estimate.update_seconds) == (old, passes)
        assert estimate.seconds.value == pytest.approx(estimate.rollout_seconds.value + old + passes)
    assert ArmEstimate.of(rows, iteration).old_logprobs_seconds is None


def test_an_estimate_holds_for_the_run_that_follows():
    """Eight questions against a run on all 32: three visits of each, the first without a prefix (lazy)."""
    size = ["--data.train.size", "32", "--data.batch_size", "8"]
    report = plan(*size, "--questions", "8", "--kept_shares", "[]")
    main(["fit", *SMALL, *size, "--trainer.max_steps", "12", "--model.optimizer.lr", "1e-6",
          "--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false"])  # fmt: skip
    metrics = pd.read_csv("runs/quickstart/version_0/metrics.csv")
    shares = metrics["rollout/informative_share"].dropna().to_numpy()
    decoded = metrics["tokens/decode"].dropna().to_numpy()
    for name, visits in (("no prefix", slice(0, 4)), ("cut: AnchoredCut", slice(4, 12))):
        arm, mean = arms_of(report)[name], shares[visits].mean()
        error = 2 * shares[visits].std(ddof=1) / len(shares[visits]) ** 0.5  # the run is a sample, too
        assert arm["informative_share"]["low"] - error <= mean <= arm["informative_share"]["high"] + error
        assert decoded[visits].mean() == pytest.approx(arm["decoded_tokens"]["value"], rel=0.15)


def test_the_cut_starts_from_a_cache_that_is_filled_as_in_a_run(monkeypatch):
    requested = []
    roll_out = RPOModule.roll_out
    monkeypatch.setattr(
        RPOModule, "roll_out", lambda m, requests, *rest: requested.extend(requests) or roll_out(m, requests, *rest)
    )
    # One answer of each question, right or wrong, of which at most 60 tokens are cut.
    report = plan("--kept_shares", "[]", "--cache.initialisation", "eager", "--cache.refresh", "EpsilonGreedyRefresh",
                  "--cache.cut", "UniformCut", "--cache.cut.max_cut", "60", "--cache.budget.slack", "9")  # fmt: skip
    of_cut = requested[1 + 6 :]
    assert [r.cut <= 60 and r.max_new_tokens == r.cut + 9 for r in of_cut] == [True] * 6
    assert arms_of(report)["cut: UniformCut"]["questions_with_prefix"] == 6


# -- the advice ----------------------------------------------------------------------------------


def arm(name: str, rates: list[float], tokens: int = 100, prefix: int = 0) -> ArmEstimate:
    """An arm of 40 questions with eight answers each, whose success rates repeat."""
    counts = [round(8 * rates[i % len(rates)]) for i in range(40)]
    rows = [Answers(name, str(i), tuple(j < c for j in range(8)), (tokens,) * 8, prefix, 100, 1.0)
            for i, c in enumerate(counts)]  # fmt: skip
    return ArmEstimate.of(rows, Iteration(groups=16, group_size=8), UpdateSeconds(0.0, 0.01))


NEVER, RARELY, OFTEN, MOSTLY = [0.0], [0.125, 0.0, 0.0, 0.0], [0.375], [1.0, 1.0, 0.875]
NOW_AND_THEN, HARDLY = [0.125, 0.0], [0.125, *[0.0] * 19]


@pytest.mark.parametrize(
    ("plain", "shares", "cut", "traced", "expected", "said"),
    [
        (NEVER, [], None, 0, Advice.NEITHER, "Look for correct traces"),
        (NEVER, [[0.25]], [0.25], 30, Advice.SUPERVISED_FIRST, "1.00 of the groups would teach today"),
        (NEVER, [NEVER], NEVER, 30, Advice.SUPERVISED_FIRST, "hardly any group would teach"),
        (HARDLY, [[0.5]], [0.5], 0, Advice.NEITHER, "only 0.05 of the groups teach"),
        (RARELY, [[0.5]], [0.5], 0, Advice.THIS_CUT, "cache.cut.plain_share"),
        (RARELY, [NEVER], NEVER, 0, Advice.FULL_PATH, "0.25 of its groups teach"),
        (NOW_AND_THEN, [NEVER], NEVER, 0, Advice.FULL_PATH, "no prefix of this sample clearly"),
        (NOW_AND_THEN, [], None, 0, Advice.FULL_PATH, "0.50 of its groups teach"),
        (NOW_AND_THEN, [[0.5]], [0.5], 0, Advice.THIS_CUT, "cache.cut.plain_share"),
        (NOW_AND_THEN, [[0.5]], NEVER, 0, Advice.OTHER_SHARE, "TargetSuccessCut"),
        (NOW_AND_THEN, [[0.5]], None, 0, Advice.OTHER_SHARE, "low=0.40 and high=0.60"),
        # Some always, some never: on average they look like questions of medium difficulty.
        ([0.0, 1.0], [[0.5, 1.0]], None, 0, Advice.OTHER_SHARE, "0.00 of the full path's"),
        (OFTEN, [[0.5]], [0.5], 0, Advice.FULL_PATH, "0.50 times the tokens"),
        (OFTEN, [[0.5]], None, 30, Advice.FULL_PATH, "1.00 of its groups teach"),
        (MOSTLY, [[1.0]], [1.0], 0, Advice.FULL_PATH, "dynamic_sampling"),
    ],
)
def test_the_rules(plain, shares, cut, traced, expected, said):
    # A prefix halves what is decoded.
    kept = [arm(f"keep {i}", rates, tokens=50, prefix=50) for i, rates in enumerate(shares)]
    verdict = judge(arm("no prefix", plain), kept, cut and arm("cut: C", cut, tokens=50, prefix=50), traced)
    assert verdict.advice is expected
    assert said in " ".join(verdict.sentences)
    for sentence in verdict.sentences:
        assert re.fullmatch(r"[A-Z](?:[^.]|\.(?=\S))*\.", sentence)  # one sentence each


def test_a_share_must_teach_clearly_more_for_each_token():
    assert not arm("a", OFTEN).teaches_more_than(arm("b", OFTEN))
    assert not arm("a", [0.5, 0.0, 0.0], tokens=99).teaches_more_than(arm("b", [0.5, 0.0, 0.0, 0.0]))
    assert arm("a", OFTEN, tokens=90).teaches_more_than(arm("b", OFTEN))  # every resample


def test_an_interval_near_a_limit_is_told():
    assert judge(arm("no prefix", [0.25, 0.125]), [], None, 0).is_near_a_limit
    assert not judge(arm("no prefix", OFTEN), [], None, 0).is_near_a_limit


def traces(operations: int, seed: int = 1, size: int = 6) -> None:
    """Whole solutions of the training questions, in the policy's own style."""
    rng = np.random.default_rng(seed)
    problems: list[ArithmeticProblem] = [draw_problem(rng, operations) for _ in range(size)]
    rows = [{"question": p.question, "answer": p.answer, "response": p.solution()} for p in problems]
    Path("traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_that_are_never_solved_need_traces_and_who_has_some_imitates_first(monkeypatch, capsys):
    unknown = [*UNKNOWN, "--kept_shares", "[0.9]"]
    assert plan(*unknown)["advice"] == Advice.NEITHER.value
    assert "\ncut: AnchoredCut: not sampled, since nothing is cached" in capsys.readouterr().out
    traces(operations=8)
    main(
        [
            "cache",
            "import",
            *SMALL,
            *UNKNOWN,
            "--path",
            "traces.jsonl",
            "--response_column",
            "response",
            "--out",
            "c.parquet",
        ]
    )
    files = []
    monkeypatch.setattr(experience_cache, "read_cache", lambda *a: files.append(a[0]) or read_cache(*a))
    report = plan(*unknown, "--cache.path", "c.parquet")
    assert files == ["c.parquet"]  # once for all arms
    assert report["advice"] == Advice.SUPERVISED_FIRST.value
    assert (report["questions_with_own_correct_response"], report["questions_with_trace"]) == (0, 6)
    assert arms_of(report)["keep 0.9"]["questions_with_prefix"] == 6
    assert "for 6 of 6 questions (0 with the policy's own, 6 with one from cache.path)" in capsys.readouterr().out


# -- one line each -------------------------------------------------------------------------------


def test_a_cut_that_keeps_nothing_is_left_out_with_a_line(capsys):
    report = plan("--cache.cut.low", "0", "--cache.cut.high", "0", "--kept_shares", "[]")
    line = "cut: AnchoredCut: left out, since it kept nothing of any cached response: it would be the full path"
    assert line in capsys.readouterr().out.splitlines()
    assert list(arms_of(report)) == ["no prefix"]


def test_fewer_answers_than_a_group_are_told(capsys):
    plan("--samples", "2", "--kept_shares", "[]", "--cache", "null")
    shown = capsys.readouterr().out
    assert "2 answers are fewer than a group of 4" in shown
    assert "\ncut:" not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.train", ""], "data.train is not set"),
        (["--questions", "0"], "--questions must be at least 1"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--kept_shares", "[0.5, 1]"], "--kept_shares must lie between 0 and 1, got 0.5, 1"),
        (["--samples", "many"], "samples"),
        (["--cache.path", "missing.parquet"], "missing.parquet: no such cache file"),
        (["--cache.path", "foreign.parquet"], "foreign.parquet: made with another tokenizer"),
        (["--cache.path", "other.parquet"], "other.parquet: made for another data set"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, expected, tokenizer, capsys):
    write_cache(ExperienceCache("foreign"), "foreign.parquet")
    other = ExperienceCache(tokenizer_fingerprint(tokenizer))
    other.entry("some question")
    write_cache(other, "other.parquet")
    with pytest.raises(SystemExit) as ended:
        main(["plan", *SMALL, "--samples", "2", *arguments])
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpo-lightning: error:")]
    assert expected in error
