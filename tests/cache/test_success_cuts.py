"""Cuts follow success: towards one half, or by AdaBack's intervals; the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from rpo_lightning.cache import (
    AnchoredCut,
    AnchorsRefresh,
    BisectionCut,
    CachedResponse,
    CorrectMemberRefresh,
    EpsilonGreedyRefresh,
    ExperienceCache,
    FractionOfShortestCut,
    FullBudget,
    GroupOutcome,
    TargetSuccessCut,
    UniformCut,
)
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.success_predictor import SuccessPredictor
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Prompt, RolloutRequest
from tests.conftest import cache_contents, make_group

LENGTH = 1000


def entry(cache: ExperienceCache, uid: str = "q", verdicts=(True,)):
    for slot, correct in enumerate(verdicts):
        ids = np.full(LENGTH, 3 + slot, np.int32)
        cache.remember(uid, CachedResponse(ids, float(correct), correct, True, ((0, LENGTH),)), slot)
    return cache.entry(uid)


def outcome(kept: int, successes: int, members: int = 4, cached_correct: bool = True) -> GroupOutcome:
    correct = [i < successes for i in range(members)]
    cut = LENGTH - kept if kept else 0
    return GroupOutcome(kept, cut, [float(c) for c in correct], correct, [LENGTH] * members, cached_correct)


def draws(cut, of_entry, count: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([cut.prefix_length(of_entry, cut.anchor(of_entry, rng), rng) for _ in range(count)]) / LENGTH


def test_the_kept_share_is_where_the_target_is_expected():
    cut, cached = TargetSuccessCut(spread=0.0), entry(ExperienceCache("abc"))
    assert set(draws(cut, cached)) == {0.5}  # the prior's half
    cut.observe(cached, outcome(500, 0))
    predicted = SuccessPredictor(cached.shared["success"]).kept_share(0.5, True, LENGTH, cached.state)
    assert predicted > 0.6
    assert set(draws(cut, cached)) == {int(1000 * predicted) / 1000}
    for _ in range(30):
        cut.observe(cached, outcome(900, 0))
    assert draws(cut, cached).max() <= 0.95
    for _ in range(30):
        cut.observe(cached, outcome(0, 4))
    assert set(draws(cut, cached)) == {0.0}  # mostly solved: the full path


def test_targets_are_spread_around_one_half():
    # Prior: p = 0.25 ** (1 - s), so targets of 0.4 and 0.6 lie at s = 1 - log p / log 0.25.
    shares = draws(TargetSuccessCut(spread=0.1), entry(ExperienceCache("abc")))
    assert shares.min() == pytest.approx(1 - np.log(0.4) / np.log(0.25), abs=0.002)
    assert shares.max() == pytest.approx(1 - np.log(0.6) / np.log(0.25), abs=0.002)


def test_another_question_learns_from_the_first_but_keeps_its_own_correction():
    cut, cache = TargetSuccessCut(spread=0.0), ExperienceCache("abc")
    first, second = entry(cache, "first"), entry(cache, "second")
    for _ in range(3):
        cut.observe(first, outcome(500, 0))
    assert 0.5 < draws(cut, second)[0] < draws(cut, first)[0]
    assert second.state == {}


def test_failing_prefixes_are_cut_for_questions_that_are_mostly_solved_and_only_if_asked_for():
    cache = ExperienceCache("abc")
    cached, rng = entry(cache, verdicts=(True, False)), np.random.default_rng(0)
    cut, plain = TargetSuccessCut(failing_prefixes=True), TargetSuccessCut()
    assert cut.anchor(cached, rng).correct  # the prior: a quarter is solved
    for _ in range(5):
        cut.observe(cached, outcome(0, 4))
    assert not cut.anchor(cached, rng).correct
    assert draws(cut, cached).min() > 0
    assert plain.anchor(cached, rng).correct
    assert draws(plain, cached).max() == 0
    before = draws(cut, cached).mean()
    correct_slope, wrong_slope = cached.shared["success"]["mean"][1:3]
    cut.observe(cached, outcome(int(before * LENGTH), 0, cached_correct=False))  # hardly any recovers
    assert draws(cut, cached).mean() < before
    assert cached.shared["success"]["mean"][1] == pytest.approx(correct_slope, abs=0.02)
    assert cached.shared["success"]["mean"][2] > wrong_slope + 0.05
    only_wrong = entry(ExperienceCache("abc"), verdicts=(False,))
    assert plain.anchor(only_wrong, rng) is None


def test_bisection_keeps_more_after_failure_and_less_after_success():
    cut, cached = BisectionCut(threshold=0.5), entry(ExperienceCache("abc"))
    shares = draws(cut, cached)
    assert 0 <= shares.min() < 0.01
    assert 0.89 < shares.max() < 0.9
    for kept, successes, interval in (
        (300, 1, [0.3, 0.9]),  # 1 of 4 is below 1/2
        (600, 2, [0.0, 0.6]),
        (200, 0, [0.2, 0.6]),
        (0, 0, [0.2, 0.6]),  # failure without a prefix says nothing new
        (400, 3, [0.0, 0.4]),
        (100, 4, [0.0, 0.1]),
        (90, 0, [0.09, 0.1]),  # the upper end never rises
        (0, 4, [0.0, 0.0]),
    ):
        cut.observe(cached, outcome(kept, successes))
        assert cached.state["interval"] == interval
        shares = draws(cut, cached)
        assert shares.min() >= interval[0] - 1e-3
        assert shares.max() <= interval[1]


def test_the_upper_end_of_a_questions_interval_never_rises_whatever_share_was_kept():
    cut, cached = BisectionCut(threshold=0.5), entry(ExperienceCache("abc"))
    for kept, successes, interval in (
        (950, 4, [0.0, 0.9]),  # a cut that was moved beyond the highest share
        (300, 4, [0.0, 0.3]),
        (600, 4, [0.0, 0.3]),  # the same iteration's second group, drawn from the interval before
        (600, 0, [0.3, 0.3]),
        (200, 0, [0.2, 0.3]),
    ):
        cut.observe(cached, outcome(kept, successes))
        assert cached.state["interval"] == interval
    rng, high = np.random.default_rng(0), 0.3
    for _ in range(300):
        cut.observe(cached, outcome(int(rng.integers(0, 1000)), int(rng.integers(0, 5))))
        low, now = cached.state["interval"]
        assert 0 <= low <= now <= high
        high = now
    assert all(low <= high for low, high in cached.shared["bisection"]["of_iteration"])


def test_bisection_starts_new_questions_in_the_moving_average_of_intervals():
    cut, cache = BisectionCut(), ExperienceCache("abc")
    cut.observe(entry(cache, "a"), outcome(300, 0))  # [0.3, 0.9]
    cut.observe(entry(cache, "b"), outcome(500, 4))  # [0.0, 0.5]
    assert draws(cut, entry(cache, "new")).max() > 0.89  # an iteration counts when it is complete
    cut.end_iteration(cache)
    assert cache.shared["bisection"]["interval"] == pytest.approx([0.2 * 0.15, 0.8 * 0.9 + 0.2 * 0.7])
    cut.end_iteration(cache)  # an iteration without cuts changes nothing
    assert cache.shared["bisection"]["interval"] == pytest.approx([0.03, 0.86])
    shares = draws(cut, entry(cache, "new"))
    assert shares.min() == pytest.approx(0.03, abs=0.005)
    assert shares.max() == pytest.approx(0.86, abs=0.005)


def test_a_served_iteration_tells_the_cut_of_wrong_anchors_and_of_its_end():
    target = served(TargetSuccessCut(failing_prefixes=True), AnchorsRefresh())
    request = RolloutRequest(Prompt("q", "question", (1,), "0"), (3, 4), 8, 4, ((0, 2),), cached_correct=False)
    group = make_group([1.0, 0.0])
    group.request = request
    assert target.update_from(group).outcome.cached_correct is False
    bisection = served(BisectionCut(), CorrectMemberRefresh())
    cut_group = make_group([1.0, 1.0], prefix_ids=(3, 4, 5), cached_length=6)  # half of a response, and success
    assert bisection.learn([cut_group], Ranks()) == pytest.approx(
        {"kept_share": 0.5, "unprefixed_success": np.nan}, nan_ok=True
    )
    assert bisection.cache.shared["bisection"] == {
        "interval": pytest.approx([0.0, 0.8 * 0.9 + 0.2 * 0.5]), "of_iteration": []
    }  # fmt: skip


def served(cut, refresh, **settings) -> CachedPrefixes:
    return CachedPrefixes(ExperienceCache("abc"), cut, FullBudget(), refresh, response_limit=400, **settings)


@pytest.mark.parametrize("cut", [TargetSuccessCut(failing_prefixes=True), BisectionCut()], ids=["target", "bisection"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_questions_end_with_the_cache_of_one_rank(cut, ranks):
    prompts = [Prompt(f"question {i}", "question", (1, 5), "0") for i in range(16)]

    def group_of(rank: CachedPrefixes, prompt: Prompt, iteration: int):
        request = rank.request(prompt)
        rng = np.random.default_rng([iteration, int(prompt.uid.split()[1])])
        suffixes = [tuple(rng.integers(3, 40, int(rng.integers(5, 60))).tolist()) for _ in range(4)]
        group = make_group((rng.random(4) < 0.3 + 0.4 * bool(request.prefix_ids)).tolist(), suffixes, step=iteration)
        group.request = request
        return group

    def run(ranks: int) -> list[CachedPrefixes]:
        of_ranks = [served(cut, AnchorsRefresh(2, 1)) for _ in range(ranks)]
        for iteration in range(12):
            visited = [prompts[(5 * iteration + i) % 16] for i in range(8)]
            share = len(visited) // ranks
            gathered = [
                [rank.update_from(group_of(rank, p, iteration)) for p in visited[n * share : (n + 1) * share]]
                for n, rank in enumerate(of_ranks)
            ]
            for rank in of_ranks:
                rank.apply_iteration(update for of_rank in gathered for update in of_rank)
        return of_ranks

    (alone,) = run(1)
    assert alone.cache.shared
    assert any(len(e.anchors) == 3 for e in alone.cache)
    for rank in run(ranks):
        assert cache_contents(rank.cache) == cache_contents(alone.cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetSuccessCut(target=1.0), "target ± spread within"),
        (lambda: TargetSuccessCut(target=0.9, spread=0.1), "target ± spread within"),
        (lambda: TargetSuccessCut(highest=1.0), "highest must lie in"),
        (lambda: TargetSuccessCut(plain_share=-0.1), "plain_share must lie in"),
        (lambda: BisectionCut(threshold=0.0), "threshold must lie in"),
        (lambda: BisectionCut(highest=0.0), "highest must lie in"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("cut", "refresh", "settings", "messages"),
    [
        (TargetSuccessCut(failing_prefixes=True), CorrectMemberRefresh(), {}, ["hardly any failing prefixes"]),
        (TargetSuccessCut(failing_prefixes=True), AnchorsRefresh(), {}, []),
        (TargetSuccessCut(), AnchorsRefresh(), {}, ["wrong responses that cache.cut=TargetSuccessCut never cuts"]),
        (AnchoredCut(), AnchorsRefresh(2, 0), {}, []),
        (UniformCut(9), AnchorsRefresh(2, 0), {}, ["cache.cut=UniformCut cuts the one in slot 0 only"]),
        (FractionOfShortestCut(), AnchorsRefresh(), {}, ["keeps up to 2 responses of a question"]),
        (UniformCut(9), AnchorsRefresh(1, 0), {}, []),
        (BisectionCut(), CorrectMemberRefresh(), {"on_failure": "restart"}, ["would keep more of the response"]),
        (AnchoredCut(), CorrectMemberRefresh(), {"on_failure": "restart"}, []),
        (AnchoredCut(), EpsilonGreedyRefresh(), {"prefer_own": False}, ["no effect without cache.path"]),
    ],
)
def test_settings_without_effect_on_each_other_are_told(cut, refresh, settings, messages):
    caveats = list(served(cut, refresh, **settings).caveats(has_traces=False))
    assert len(caveats) == len(messages)
    assert all(message in caveat for message, caveat in zip(messages, caveats, strict=True))
