"""Word problems are right, distinct, and either trained on or held out."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data import WordProblems
from rpo_lightning.data.word_problems import _ONE_STEP, _TWO_STEPS

# The arithmetic of every story, told by what stands in it.
ARITHMETIC = {
    r"has (\d+) \w+ and buys (\d+) more": lambda a, b: a + b,
    r"had (\d+) \w+ and gave away (\d+)": lambda a, b: a - b,
    r"are (\d+) boxes with (\d+) \w+ in each": lambda a, b: a * b,
    r"costs (\d+) dollars\. How many dollars do (\d+) ": lambda a, b: a * b,
    r"reads (\d+) pages .* in (\d+) days": lambda a, b: a * b,
    r"is (\d+) years old\. .* in (\d+) years": lambda a, b: a + b,
    r"has (\d+) boxes with (\d+) .* gives away (\d+)": lambda a, b, c: a * b - c,
    r"has (\d+) \w+, buys (\d+) more and then loses (\d+)": lambda a, b, c: a + b - c,
    r"buys (\d+) \w+ for (\d+) dollars each and one book for (\d+)": lambda a, b, c: a * b + c,
    r"has (\d+) dollars and buys (\d+) \w+ for (\d+)": lambda a, b, c: a - b * c,
    r"has (\d+) \w+\. \w+ has (\d+) more": lambda a, b: 2 * a + b,
    r"has (\d+) passengers\. At a stop (\d+) get off and (\d+) get on": lambda a, b, c: a - b + c,
}


def test_answers_are_those_of_the_stories():
    seen = set()
    for row in WordProblems(600).rows():
        (story,) = [s for s in ARITHMETIC if re.search(s, row["question"])]
        numbers = [int(n) for n in re.search(story, row["question"]).groups()]
        assert re.findall(r"\d+", row["question"]) == [str(n) for n in numbers]
        assert row["answer"] == str(ARITHMETIC[story](*numbers))
        seen.add(story)
    assert len(seen) == len(ARITHMETIC)


def test_every_answer_is_a_whole_number_above_zero():
    for template in (*_ONE_STEP, *_TWO_STEPS):
        corners = [()]
        for low, high in template.ranges:
            corners = [(*corner, end) for corner in corners for end in (low, high)]
        assert min(template.answer(*corner) for corner in corners) > 0  # each is monotonic in every number


def test_problems_are_distinct_and_no_held_out_one_is_trained_on_whatever_the_seed():
    train = [{r["question"] for r in WordProblems(800, seed=seed).rows()} for seed in (0, 1)]
    held_out = [{r["question"] for r in WordProblems(800, "held_out", seed=seed).rows()} for seed in (0, 1)]
    assert [len(questions) for questions in (*train, *held_out)] == [800] * 4
    assert not (train[0] | train[1]) & (held_out[0] | held_out[1])


def test_a_larger_set_begins_as_a_smaller_one_and_a_seed_gives_the_same_set():
    sets = [list(WordProblems(size, seed=3).rows()) for size in (50, 50, 200)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in pairwise(sets))


def test_steps_are_one_two_or_both():
    assert {r["steps"] for r in WordProblems(50, steps=1).rows()} == {"1"}
    assert {r["steps"] for r in WordProblems(50, steps=2).rows()} == {"2"}
    assert [r["steps"] for r in WordProblems(4).rows()] == ["1", "2", "1", "2"]


@pytest.mark.parametrize("settings", [{"size": 0}, {"size": 5000}, {"size": 9, "steps": 3}, {"size": 9, "part": "val"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigurationError, match="WordProblems needs 1 <= size <= 1000"):
        WordProblems(**settings)
