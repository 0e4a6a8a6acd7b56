"""The predictor's numbers are those of its posterior, and it finds p = 1/2 for policies of known success."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from rpo_lightning.cache.success_predictor import (
    LEVEL_VARIANCE,
    MEMORY,
    PRIOR_MEAN,
    PRIOR_VARIANCE,
    SuccessPredictor,
)


def test_before_any_group_a_quarter_is_solved_from_the_start_and_half_after_half_a_correct_response():
    predictor, question = SuccessPredictor({}), {}
    assert predictor.success(0.0, True, None, question) == pytest.approx(0.25)
    assert predictor.success(0.5, True, None, question) == pytest.approx(0.5)
    assert predictor.success(0.75, True, None, question) == pytest.approx(0.25**0.25)
    assert predictor.kept_share(0.5, True, None, question) == pytest.approx(0.5)
    # After half of a wrong response, twice as many errors are expected.
    assert predictor.success(0.5, False, None, question) == pytest.approx(0.25**2)
    assert predictor.kept_share(0.25**2, False, None, question) == pytest.approx(0.5)


def test_no_share_is_kept_where_none_leads_to_the_target():
    predictor, question = SuccessPredictor({}), {}
    assert predictor.kept_share(0.2, True, None, question) == 0.0  # solved more often without a prefix
    assert predictor.kept_share(0.5, False, None, question) == 0.0  # solved less often without one


@pytest.mark.parametrize(
    ("kept_share", "correct", "successes"), [(0.0, True, 0), (0.6, True, 3), (0.6, True, 8), (0.3, False, 5)]
)
def test_a_group_moves_the_coefficients_to_the_mode_of_their_posterior(kept_share, correct, successes):
    shared, question = {}, {}
    predictor = SuccessPredictor(shared)
    predictor.observe(kept_share, correct, 100, question, successes, members=8)

    left = math.log(1 - kept_share)
    x = np.array([1.0, left if correct else 0.0, 0.0 if correct else -left, 0.0, 1.0])  # the last one is u
    covariance = np.diag([*PRIOR_VARIANCE, LEVEL_VARIANCE])
    of_all = covariance[:4, :4] @ x[:4]
    covariance[:4, :4] += (1 / MEMORY - 1) * np.outer(of_all, of_all) / (of_all @ x[:4])
    mean = np.array([*PRIOR_MEAN, 0.0])

    def negative_log_posterior(theta):
        errors = math.exp(x @ theta)
        likelihood = -successes * errors + (8 - successes) * math.log(-math.expm1(-errors))
        return 0.5 * (theta - mean) @ np.linalg.solve(covariance, theta - mean) - likelihood

    mode = minimize(negative_log_posterior, mean, method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose([*shared["mean"], question["level"]], mode, atol=1e-5)

    errors = math.exp(x @ mode)
    information = 8 * errors**2 * math.exp(-errors) / (1 - math.exp(-errors))
    after = np.linalg.inv(np.linalg.inv(covariance) + information * np.outer(x, x))
    np.testing.assert_allclose(shared["covariance"], after[:4, :4], atol=1e-5)
    np.testing.assert_allclose(question["level_variance"], after[4, 4], atol=1e-5)


CURVES = {
    "an error is equally likely at every token, p0 = 0.001": lambda s: 0.001 ** (1 - s),
    "the same, p0 = 0.02": lambda s: 0.02 ** (1 - s),
    "the same, p0 = 0.2": lambda s: 0.2 ** (1 - s),
    "logistic": lambda s: 1 / (1 + math.exp(-8 * (s - 0.6))),
    "the end decides": lambda s: 0.05 if s < 0.8 else min(0.95, 0.05 + 0.9 * (s - 0.8) / 0.2),
    "easy questions, wrong prefixes": lambda s: 0.9 * (1 - s) ** 1.5,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("one_question", [False, True], ids=["new questions", "one question"])
def test_it_finds_one_half_within_ten_groups_of_a_kind_of_question(name, one_question):
    curve, is_correct = CURVES[name], "wrong" not in name
    reached = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shared, question = {}, {}
        for group in range(20):
            question = question if one_question else {}
            predictor = SuccessPredictor(shared)
            share = predictor.kept_share(0.5, is_correct, None, question)
            success = curve(share)
            if group >= 10:
                reached.append(success)
            predictor.observe(share, is_correct, None, question, int(rng.binomial(8, success)), 8)
    assert abs(np.mean(reached) - 0.5) < 0.05
    without_variance = np.mean([p**8 + (1 - p) ** 8 for p in reached])
    assert without_variance < 0.1


def test_a_first_visit_is_near_its_point_once_lengths_tell_kinds_of_questions_apart():
    # The longer a response, the more often it goes wrong: p0 is 0.5 at 50 tokens and 0.004 at 400.
    rng, shared = np.random.default_rng(0), {}
    reached = []
    for group in range(120):
        length = int(rng.choice([50, 100, 200, 400]))
        predictor = SuccessPredictor(shared)
        share = predictor.kept_share(0.5, True, length, {})
        success = 0.5 ** (length / 50 * (1 - share))
        if group >= 40:
            reached.append(success)
        predictor.observe(share, True, length, {}, int(rng.binomial(8, success)), 8)
    assert abs(np.mean(reached) - 0.5) < 0.05
    assert max(np.abs(np.array(reached) - 0.5)) < 0.25
    assert shared["mean"][3] > 0.5


def test_a_question_that_differs_from_the_others_is_corrected():
    rng, shared, hard = np.random.default_rng(0), {}, {}

    def visit(exponent, question):
        predictor = SuccessPredictor(shared)
        share = predictor.kept_share(0.5, True, None, question)
        success = 0.3 ** (exponent * (1 - share))
        predictor.observe(share, True, None, question, int(rng.binomial(8, success)), 8)
        return success

    for _ in range(30):
        visit(1.0, {})
    first = visit(5.0, hard)  # taken for one like the others
    for _ in range(3):
        for _ in range(10):
            visit(1.0, {})
        last = visit(5.0, hard)
    assert first < 0.15
    assert abs(last - 0.5) < 0.2
    assert hard["level"] > 0.5


def test_it_follows_a_policy_that_changes_and_stays_sound_for_long():
    rng, shared, errors, reached = np.random.default_rng(0), {}, 4.0, []
    for group in range(5000):
        errors *= 0.997 if group < 300 else 1.0
        predictor = SuccessPredictor(shared)
        share = predictor.kept_share(0.5, True, None, {})
        success = math.exp(-errors * (1 - share))
        if 50 <= group < 300:
            reached.append(success)
        predictor.observe(share, True, None, {}, int(rng.binomial(8, success)), 8)
    assert abs(np.mean(reached) - 0.5) < 0.1
    assert np.linalg.eigvalsh(np.array(shared["covariance"])).min() > 0
    assert np.diag(shared["covariance"]).max() < 10


def test_its_memory_is_plain_and_goes_on_exactly_where_it_stopped():
    def run(shared, question, groups):
        for group in groups:
            SuccessPredictor(shared).observe(0.1 * (group % 9), group % 2 == 0, 100 + group, question, group % 9, 8)

    whole, question = {}, {}
    run(whole, question, range(40))
    shared, of_question = {}, {}
    run(shared, of_question, range(17))
    shared, of_question = json.loads(json.dumps(shared)), json.loads(json.dumps(of_question))
    run(shared, of_question, range(17, 40))
    assert (shared, of_question) == (whole, question)
