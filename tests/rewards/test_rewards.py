"""Rewards equal hand-computed numbers; grading is right, bounded in time, and its failures are counted."""

from __future__ import annotations

import math
import os
import time

import pytest

from rpo_lightning.core.errors import ConfigurationError, RewardError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards import (
    AccuracyReward,
    ChoiceVerifier,
    CosineLengthReward,
    ExactMatchVerifier,
    FormatReward,
    FunctionReward,
    Grader,
    GradingPool,
    KimiLengthReward,
    LengthAwareAccuracyReward,
    MathVerifier,
    Reward,
    SoftOverlongPenalty,
    Verifier,
)


def sample(length: int, correct: bool = True, response: str = "") -> Sample:
    return Sample("q", response, "1", length, True, float(correct))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_length_aware_reward_prefers_short_right_answers_and_pays_wrong_ones_nothing():
    group = [sample(100), sample(300), sample(200, correct=False)]
    # Reference: the group's mean, 200. 300 tokens would get sigmoid(-1) < 0.5 and is clipped from below.
    assert LengthAwareAccuracyReward(alpha=0.01).score(group) == pytest.approx([sigmoid(1.0), 0.5, 0.0])


def test_length_aware_reference_over_correct_members_only():
    group = [sample(100), sample(200), sample(900, correct=False)]
    values = LengthAwareAccuracyReward(alpha=0.1, reference="correct").score(group)
    assert values == pytest.approx([sigmoid(5.0), 0.5, 0.0])


def test_length_aware_reward_restores_variance_in_an_all_correct_group():
    values = LengthAwareAccuracyReward().score([sample(100), sample(200)])
    assert values[0] > values[1] > 0


def test_cosine_length_reward_at_its_corners():
    reward = CosineLengthReward(max_length=100)
    group = [sample(0), sample(50), sample(100), sample(0, False), sample(50, False), sample(200, False)]
    assert reward.score(group) == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5])


def test_kimi_length_reward():
    group = [sample(100), sample(200), sample(300), sample(100, False), sample(300, False)]
    assert KimiLengthReward().score(group) == pytest.approx([0.5, 0.0, -0.5, 0.0, -0.5])
    assert KimiLengthReward().score([sample(5), sample(5)]) == [0.0, 0.0]


def test_soft_overlong_penalty():
    lengths = [70, 80, 90, 100, 130]
    values = SoftOverlongPenalty(limit=100, buffer=20).score([sample(n) for n in lengths])
    assert values == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.0])


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>a</think><answer>1</answer>", 1.0),
        ("<think>\n\n</think>\n<answer>1</answer>\n", 1.0),
        ("a\n</think>\n<answer>1</answer>\n", 0.0),  # nobody opened the thoughts
        ("<answer>1</answer>", 0.0),
        ("<think>a</think> 1", 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
    ],
)
def test_format_reward(response, value):
    assert FormatReward().score([sample(1, response=response)]) == [value]


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("</think><answer>\\boxed{72}</answer>", "72", 1.0),
        ("<think>\\boxed{5}</think> The answer is \\boxed{6}.", "5", 0.0),
        ("The total is 1,234 apples", "1234", 1.0),
        ("x = 3", "$x=4$", 0.0),
        ("", "4", 0.0),
    ],
)
def test_math_verifier(response, answer, verdict):
    assert MathVerifier().verify("q", response, answer) == verdict


def test_a_gold_answer_that_cannot_be_parsed_is_told():
    assert MathVerifier().gold_problem("72") is None
    assert MathVerifier().gold_problem("\\frac{3}{4}") is None
    assert MathVerifier().gold_problem("") is not None


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("The answer is B!", 1.0),
        ("Answer: B! Not A.", 1.0),
        ("\uff22", 1.0),  # a full-width letter
        ("Answer: \uff08B\uff09", 1.0),  # full-width brackets
        ("\u0412", 0.0),  # a Cyrillic letter
        ("Answer: Bob", 0.0),
        ("", 0.0),
    ],
)
def test_a_choice_is_read_however_it_is_written(response, verdict):
    assert ChoiceVerifier().verify("", response, "B") == verdict


def test_exact_match_needs_the_marker():
    verifier = ExactMatchVerifier()
    assert [verifier.verify("q", r, "7") for r in ("a#7", "7", "#7#8")] == [1.0, 0.0, 0.0]


def test_total_is_the_weighted_sum_and_terms_stay_visible():
    grader = Grader(
        ExactMatchVerifier(), [AccuracyReward(weight=2.0), SoftOverlongPenalty(10, 10, weight=0.5)], GradingPool()
    )
    (graded,) = grader.grade([[sample(5, response="#1"), sample(10, response="#2")]])
    assert graded.rewards == [2.0 - 0.25, -0.5]
    assert graded.terms == {"accuracy": [1.0, 0.0], "soft_overlong_penalty": [-0.5, -1.0]}


class GivenReward(Reward):
    """Returns what it is given, under a name that it is given."""

    def __init__(self, values, name="given"):
        super().__init__()
        self.values = values
        self._name = name

    @property
    def name(self):
        return self._name

    def score(self, group):
        return self.values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], "reward 'given' returned nan for the response 'two': return a finite number"),
        ([float("-inf"), 1.0], "reward 'given' returned -inf for the response 'one'"),
        ([1.0], "reward 'given' returned 1 values for 2 responses"),
        ([1.0, 2.0, 3.0], "reward 'given' returned 3 values for 2 responses"),
        ([1.0, "two"], "reward 'given' returned str, which is no number"),
        ([1.0, "2"], "reward 'given' returned str, which is no number: it is the text '2'"),
        ([b"1", 1.0], "reward 'given' returned bytes, which is no number"),
    ],
)
def test_what_cannot_be_trained_on_is_told_with_the_term_that_returned_it(values, message):
    grader = Grader(ExactMatchVerifier(), [AccuracyReward(), GivenReward(values)], GradingPool())
    with pytest.raises(RewardError, match=message):
        grader.grade([[sample(1, response="one"), sample(1, response="two")]])


class UndecidedVerifier(Verifier):
    isolated = False

    def __init__(self, verdict=float("nan")):
        self.verdict = verdict

    def verify(self, prompt, response, answer):
        return self.verdict


def test_a_verdict_that_is_not_finite_is_an_error():
    with pytest.raises(RewardError, match="UndecidedVerifier returned nan for the response 'one'"):
        Grader(UndecidedVerifier(), [AccuracyReward()], GradingPool()).grade([[sample(1, response="one")]])


@pytest.mark.parametrize(("verdict", "is_told"), [(-1, True), (2, True), (math.nextafter(1, 2), False), (-1e-9, False)])
def test_a_verdict_that_is_outside_wrong_and_right_is_told_once_unless_by_rounding(verdict, is_told, caplog):
    grader = Grader(UndecidedVerifier(verdict), [AccuracyReward()], GradingPool())
    for _ in range(2):
        ((graded,),) = (group.samples for group in grader.grade([[sample(1, response="one")]]))
        assert graded.correct == verdict
    assert caplog.text.count("UndecidedVerifier returned a verdict outside 0") == is_told


@pytest.mark.parametrize("name", ["mean", "std", "correct_share", "grading_killed"])
def test_a_term_cannot_have_the_name_of_another_metric(name):
    with pytest.raises(ConfigurationError, match=f"a term named '{name}', .* reward/{name} is another metric"):
        Grader(ExactMatchVerifier(), [AccuracyReward(), GivenReward([1.0], name)], GradingPool())


def hang_on_two(prompt: str, response: str, answer: str) -> float:
    if response == "2":
        time.sleep(600)
    if response == "crash":
        os._exit(1)
    return float(response)


def fail(prompt: str, response: str, answer: str) -> float:
    raise KeyError("no such thing")


def test_a_call_over_the_limit_or_in_a_crashed_process_is_killed_scored_zero_counted_and_told_once(caplog):
    pool = GradingPool(workers=2, timeout_seconds=1.0)
    try:
        values = pool.numbers(hang_on_two, [("q", r, "a") for r in ("1", "2", "crash", "3")])
    finally:
        pool.close()
    assert values == [1.0, 0.0, 0.0, 3.0]
    assert pool.killed == 2
    assert caplog.text.count("killed after 1 s") == 1


def forget_to_return(prompt: str, response: str, answer: str) -> None:
    return None


def test_a_reward_that_is_no_number_is_an_error_and_not_a_zero():
    pool = GradingPool()
    with pytest.raises(RewardError, match="forget_to_return returned NoneType, which is no number"):
        pool.numbers(forget_to_return, [("q", "r", "a")])
    pool.close()


def test_an_exception_in_a_users_function_ends_with_its_name_and_cause():
    pool = GradingPool()
    with pytest.raises(RewardError, match=r"fail raised KeyError: 'no such thing'"):
        pool.numbers(fail, [("q", "r", "a")])


def test_a_users_function_is_called_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(prompt, response, answer):\n    return 1.0 / len(response)\n")
    monkeypatch.chdir(tmp_path)
    pool = GradingPool(workers=1)
    try:
        reward = FunctionReward("my_rewards.short")
        assert reward.name == "short"
        assert reward.score_groups([[sample(1, response="ab")], [sample(1, response="abcd")]], pool) == [[0.5], [0.25]]
    finally:
        pool.close()
    with pytest.raises(ConfigurationError, match=r"my_rewards\.long"):
        FunctionReward("my_rewards.long")
