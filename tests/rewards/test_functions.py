"""A user's function is given what its signature asks for, in whatever process it runs."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import re

import pytest

from rpo_lightning.core.errors import ConfigurationError, RewardError
from rpo_lightning.core.types import GoldAnswer, Sample
from rpo_lightning.rewards import (
    AccuracyReward,
    ExactMatchVerifier,
    FunctionReward,
    FunctionVerifier,
    Grader,
    GradingPool,
    Verifier,
)
from rpo_lightning.rewards.arguments import Arguments

ROW = {"question": "1+1=", "answer": "so #### 2", "difficulty": 3, "source": "hand", "prompt": "raw"}


def sample(response: str, uid: str = "q7", row=ROW) -> Sample:
    return Sample("1+1=", response, GoldAnswer("2"), len(response), True, uid=uid, row=row)


GROUP = [sample("#2"), sample("#three")]


@pytest.fixture
def grade():
    """Grades groups with a reward, in worker processes."""
    pools = []

    def grade(*rewards, groups=(GROUP,), verifier=None, **settings):
        pools.append(GradingPool(workers=1, **settings))
        return Grader(verifier or ExactMatchVerifier(), rewards, pools[-1]).grade(groups), pools[-1]

    yield grade
    for pool in pools:
        pool.close()


def texts(prompt, response, answer):
    return {"1+1=": 1}[prompt] + len(response) + float(answer)


def whole_row(prompt, response, answer, **row):
    assert sorted(row) == ["difficulty", "question", "source"]
    return row["difficulty"]


def own_names(question, text, gold, difficulty):
    assert (question, gold) == ("1+1=", "2")
    return difficulty + len(text)


def named(response, answer, difficulty, absent=10):
    return len(response) * difficulty + absent


def as_verl(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if (data_source, ground_truth, extra_info) == ("set", "2", None) else 0.0


def as_trl(prompts, completions, answer, difficulty, **kwargs):
    assert prompts == ["1+1="] * 2
    assert answer == ["so #### 2"] * 2  # the column, as in TRL
    assert sorted(kwargs) == ["question", "source"]
    return [len(text) * level for text, level in zip(completions, difficulty, strict=True)]


async def asynchronous(response, difficulty):
    await asyncio.sleep(0)
    return len(response) * difficulty


async def asynchronous_batch(completions, **kwargs):
    return [float(len(text)) for text in await asyncio.gather(*map(_echo, completions))]


async def _echo(text):
    return text


class Judge:
    """An object that can be called."""

    def __init__(self, factor):
        self.factor = factor

    async def __call__(self, response, **row):
        return self.factor * row["difficulty"] + len(response)


class WithWords:
    """An object whose attributes are called like those of a partial."""

    keywords = ("response", "answer")
    func = None

    def __call__(self, prompt, response, answer):
        return len(response) + float(answer)


def completions_alone(completions, answer):
    return [len(text) for text in completions]


VERL_ROW = {"data_source": "set"}
EXPECTED = [
    (texts, [5.0, 9.0]),
    (whole_row, [3.0, 3.0]),
    (own_names, [5.0, 9.0]),
    (named, [16.0, 28.0]),
    (as_trl, [6.0, 18.0]),
    (asynchronous, [6.0, 18.0]),
    (asynchronous_batch, [2.0, 6.0]),
    (functools.partial(named, difficulty=1), [12.0, 16.0]),
    (Judge(10), [32.0, 36.0]),
    (WithWords(), [4.0, 8.0]),
    (completions_alone, [2.0, 6.0]),
    (lambda response, difficulty: difficulty, [3.0, 3.0]),
]


@pytest.mark.parametrize(("function", "values"), EXPECTED)
def test_the_signature_decides_what_a_function_is_given_across_processes_and_in_this_one(grade, function, values):
    reward = FunctionReward(function)
    ((graded,), _) = grade(reward)
    assert graded.terms == {reward.name: values}
    assert list(reward.score(GROUP)) == values


def test_verls_names_of_parameters_are_known(grade):
    ((graded,), _) = grade(as_verl, groups=[[sample("#2", row=VERL_ROW)]])
    assert graded.terms == {"as_verl": [1.0]}


def messages(prompts, completions, **kwargs):
    assert prompts == [[{"role": "user", "content": "1+1="}]] * 2
    return [len(completion[0]["content"]) for completion in completions]


def test_a_batch_of_conversations_is_given_as_trl_gives_it(grade):
    row = {"prompt": [{"role": "user", "content": "1+1="}]}
    ((graded,), _) = grade(messages, groups=[[sample("#2", row=row), sample("#three", row=row)]])
    assert graded.terms == {"messages": [2.0, 6.0]}


def test_only_the_columns_that_a_function_takes_travel_to_its_process():
    assert Arguments(named).columns(ROW) == {"difficulty": 3}
    assert Arguments(texts).columns(ROW) == {}


def process(response):
    return os.getpid()


def test_functions_and_lambdas_run_in_another_process(grade):
    ((graded,), _) = grade(process, FunctionReward(lambda response: os.getpid(), name="other"))
    assert os.getpid() not in {*graded.terms["process"], *graded.terms["other"]}


def test_a_function_that_takes_no_response_is_refused():
    with pytest.raises(ConfigurationError, match=r"lambda\(text\) takes no response: name a parameter response"):
        FunctionReward(lambda text: 1.0)
    with pytest.raises(ConfigurationError, match=r"as_trl\) takes completions, and a verifier judges one response"):
        FunctionVerifier(as_trl)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda completion, answer, difficulty: 1.0, "would be given the prompt as 'completion'"),
        (lambda prompt, answer, text: 1.0, "would be given the response as 'answer'"),
        (lambda question, prompt, gold: 1.0, "would be given the response as 'prompt'"),
        (lambda completions, completion_ids: [1.0], "takes 'completion_ids', which functions of a batch are not given"),
        (lambda prompt, completions, **row: [1.0], "takes 'prompt', which functions of a batch are not given"),
    ],
)
def test_a_function_that_would_be_given_something_else_than_its_names_say_is_refused(function, text):
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        FunctionReward(function)


def row_of(response, **row):
    return row["self"]


def test_a_column_may_be_called_like_a_parameter_of_methods(grade):
    group = [sample("#2", row={"self": 0.5})]
    ((graded,), _) = grade(row_of, groups=[group], verifier=FunctionVerifier(row_of))
    assert (graded.rewards, graded.samples[0].correct) == ([0.5], 0.5)


def test_a_function_that_cannot_be_pickled_and_comes_too_late_is_told_in_a_line(grade):
    _, pool = grade(texts)
    with pytest.raises(RewardError, match=r"lambda> cannot be pickled, and was made after the grading processes"):
        Grader(ExactMatchVerifier(), [lambda response: 1.0], pool).grade([GROUP])


def test_functions_of_one_name_are_told_apart_by_one_that_is_given():
    pool = GradingPool()
    with pytest.raises(ConfigurationError, match="more than one term named 'lambda'"):
        Grader(ExactMatchVerifier(), [lambda response: 1.0, lambda response: 2.0], pool)
    rewards = [FunctionReward(functools.partial(named, absent=x), name=f"number_{x}") for x in (1, 2)]
    assert [r.name for r in Grader(ExactMatchVerifier(), rewards, pool).rewards] == ["number_1", "number_2"]


# -- terms that do not apply ----------------------------------------------------------------------


def only_digits(response):
    return 2.0 if response[1:].isdigit() else None


def nothing(response):
    pass


def test_a_term_that_returns_none_drops_out_and_the_others_add_up(grade):
    ((graded,), _) = grade(AccuracyReward(), FunctionReward(only_digits, weight=0.5))
    assert graded.terms == {"accuracy": [1.0, 0.0], "only_digits": [2.0, None]}
    assert graded.rewards == [2.0, 0.0]


def test_a_term_that_never_applies_and_a_response_without_any_are_told_once(grade, caplog):
    _, pool = grade(only_digits)
    assert caplog.text.count("no reward applies to a response, which gets 0 (question q7)") == 1
    grader = Grader(ExactMatchVerifier(), [AccuracyReward(), FunctionReward(nothing)], pool)
    for _ in range(2):
        grader.grade([GROUP])
    assert caplog.text.count("reward 'nothing' returned None for all 2 responses of a rollout") == 1


def test_a_verdict_must_be_a_number(grade):
    with pytest.raises(RewardError, match=r"FunctionVerifier returned NoneType, which is no number.*\(question q7\)"):
        grade(AccuracyReward(), verifier=FunctionVerifier(nothing))


# -- exceptions -----------------------------------------------------------------------------------


def fails_on_words(response):
    return float(response[1:])


async def fails_on_words_later(response):
    return fails_on_words(response)


def fails_as_a_batch(completions, **kwargs):
    return [fails_on_words(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "values", "failed"),
    [
        (fails_on_words, [2.0, 0.0], 1),
        (fails_on_words_later, [2.0, 0.0], 1),
        (fails_as_a_batch, [0.0, 0.0], 2),
    ],
)
def test_an_exception_stops_with_the_question_or_scores_zero_and_is_counted(grade, caplog, function, values, failed):
    with pytest.raises(RewardError, match=rf"^{function.__name__} raised ValueError: .*three.*\(question q7\)$"):
        grade(function)
    ((graded,), pool) = grade(FunctionReward(function, on_error="zero"))
    assert graded.terms == {function.__name__: values}
    assert pool.failed == failed
    assert caplog.text.count(f"{function.__name__} raised ValueError") == 1
    assert "(question q7): such responses count as 0" in caplog.text


@pytest.mark.parametrize("text", ["can't allocate memory: 64 GiB", "no room"])
def test_a_lack_of_memory_is_a_limit_whatever_its_class_and_whatever_on_error_says(grade, text):
    def takes_too_much(prompt, response, answer):
        if response != "#2":
            raise RuntimeError(text) from (None if "allocate" in text else MemoryError())
        return 1.0

    ((graded,), pool) = grade(FunctionReward(takes_too_much, on_error="zero"))
    assert (graded.rewards, pool.killed, pool.failed) == ([1.0, 0.0], 1, 0)


def test_a_verifier_whose_function_raises_stops_with_the_question_or_counts_as_wrong(grade):
    with pytest.raises(RewardError, match=r"FunctionVerifier\.verify raised ValueError.*\(question q7\)$"):
        grade(AccuracyReward(), verifier=FunctionVerifier(fails_on_words))
    ((graded,), pool) = grade(AccuracyReward(), verifier=FunctionVerifier(fails_on_words, on_error="zero"))
    assert [s.correct for s in graded.samples] == [2.0, 0.0]
    assert pool.failed == 1


def returns_one(completions, **kwargs):
    return [1.0]


def test_a_batch_of_another_length_is_told_with_the_question(grade):
    with pytest.raises(RewardError, match=r"reward 'returns_one' returned 1 values for 2 responses.*\(question q7\)"):
        grade(returns_one)


@pytest.mark.parametrize("values", [{"#2": 1.0, "#three": 0.0}, {1.0, 2.0}, "12", b"12"])
def test_values_of_a_batch_without_an_order_or_as_text_are_refused(grade, values):
    with pytest.raises(RewardError, match=rf"returned {type(values).__name__} for 2 responses: return a list.*q7\)$"):
        grade(lambda completions: values)


# -- verifiers that look at rows ------------------------------------------------------------------


class Strict(Verifier):
    """Right only where the row's limit allows the length."""

    def __init__(self, isolated):
        self.isolated = isolated

    def verify(self, prompt, response, answer, limit):
        return float(len(response) <= limit)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_verifier_is_given_the_columns_that_it_names(grade, isolated):
    group = [sample("#2", row={"limit": 3}), sample("#three", row={"limit": 3})]
    ((graded,), _) = grade(AccuracyReward(), groups=[group], verifier=Strict(isolated))
    assert graded.rewards == [1.0, 0.0]


def judged(response, **row):
    return float(row["source"] == "hand")


def test_a_function_that_verifies_is_given_the_row(grade):
    ((graded,), _) = grade(AccuracyReward(), verifier=FunctionVerifier(judged))
    assert graded.rewards == [1.0, 1.0]
    assert pickle.loads(pickle.dumps(FunctionVerifier(judged))).verify("q", "r", "a", source="hand") == 1.0
