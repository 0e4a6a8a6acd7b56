"""Questions are asked in proportion to the chance that they teach something, in the same order everywhere."""

from __future__ import annotations

import csv
import json
from collections import Counter
from itertools import chain, pairwise
from math import comb

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.hashing import stable_hash
from rpo_lightning.core.types import Prompt
from rpo_lightning.data import ArithmeticChain, InformativeSelection, QuestionSelection
from rpo_lightning.data.selection import (
    QuestionOutcome,
    SelectedQuestions,
    SelectedSampler,
    dealt_out,
    mixed_chance,
)
from rpo_lightning.rewards import UniformRandomReward, Verifier
from rpo_lightning.rollout import Sampling
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from tests.conftest import make_data, make_module, make_trainer

PROMPTS = [Prompt(f"q{i}", "question", (1,), "0") for i in range(40)]


def array(*values):
    return np.array(values, dtype=float)


def test_weights_by_hand():
    # Groups of 2. Unknown: Beta(1/2, 1/2): E[p²] = (1/2)(3/2) / (1 * 2) = 3/8, twice.
    # Two right: Beta(5/2, 1/2): E[p²] = (5/2)(7/2) / (3 * 4) = 35/48, E[(1-p)²] = (1/2)(3/2) / 12 = 3/48.
    # One of each: Beta(3/2, 3/2): E[p²] = (3/2)(5/2) / (3 * 4) = 15/48, twice.
    chances = mixed_chance(array(0, 2, 0, 1), array(0, 0, 2, 1), group_size=2)
    np.testing.assert_allclose(chances, [1 / 4, 10 / 48, 10 / 48, 18 / 48])
    weights = InformativeSelection(floor=0.22).weights(array(0, 2, 0, 1), array(0, 0, 2, 1), 2)
    np.testing.assert_allclose(weights, [1 / 4, 0.22, 0.22, 18 / 48])


def test_the_chance_of_a_mixed_group_is_that_of_groups_drawn_from_what_is_known():
    generator = np.random.default_rng(0)
    rate = generator.beta(6 + 0.5, 2 + 0.5, size=200_000)
    right = generator.binomial(8, rate)
    chance = mixed_chance(array(6), array(2), group_size=8)[0]
    assert ((right > 0) & (right < 8)).mean() == pytest.approx(chance, abs=0.005)
    assert comb(16, 8) / 4**8 == pytest.approx((1 - mixed_chance(array(0), array(0), 8)[0]) / 2)


def test_places_are_dealt_out_in_proportion_and_right_on_average():
    weights = array(0.1, 0.4, 0.1, 1.4)  # of 4 places: 0.2, 0.8, 0.2, 2.8
    offsets = (np.arange(1000) + 0.5) / 1000
    counts = np.array([dealt_out(weights, offset) for offset in offsets])
    assert (counts.sum(axis=1) == 4).all()
    assert [set(of_question) for of_question in counts.T.tolist()] == [{0, 1}, {0, 1}, {0, 1}, {2, 3}]
    np.testing.assert_allclose(counts.mean(axis=0), [0.2, 0.8, 0.2, 2.8], atol=0.002)
    assert dealt_out(np.full(3, 0.1), 0.999).tolist() == [1, 1, 1]


def questions(selection=None, group_size=8, prompts=PROMPTS):
    return SelectedQuestions(prompts, selection or InformativeSelection(), group_size)


def test_an_epoch_asks_every_question_once_as_long_as_nothing_is_known_and_each_epoch_in_another_order():
    known = questions()
    orders = [known.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len(set(map(tuple, [*orders, list(range(40))]))) == 4


def test_solved_and_hopeless_questions_give_their_places_to_others_and_keep_some():
    known = questions(InformativeSelection(floor=0.1, decay=1.0))
    asked: Counter[int] = Counter()
    for epoch in range(30):
        order = known.order(epoch)
        assert len(order) == 40
        asked.update(order if epoch >= 10 else [])
        # The first 20 are always solved, 10 never, and 10 half of the time.
        rights = [8] * 20 + [0] * 10 + [4] * 10
        known.observe(QuestionOutcome(f"q{i}", rights[i], 8 - rights[i]) for i in order)
    by_kind = [sum(asked[i] for i in kind) / len(kind) / 20 for kind in (range(20), range(20, 30), range(30, 40))]
    # After many visits the weights are the floor twice, and nearly 1: 40 / (30 * 0.1 + 10 * 1) = 3.1 places each.
    assert by_kind == pytest.approx([0.33, 0.33, 3.0], abs=0.2)


def test_places_of_a_question_are_spread_over_the_epoch():
    class OneOfThem(QuestionSelection):
        def weights(self, right, wrong, group_size):
            return np.where(np.arange(len(right)) == 7, 10.0, 1.0)

    places = [i for i, question in enumerate(questions(OneOfThem()).order(0)) if question == 7]
    assert 7 <= len(places) <= 9  # 40 * 10 / 49 = 8.2
    assert all(b - a > 1 for a, b in pairwise(places))


def test_outcomes_fade_by_the_epoch():
    known = questions(InformativeSelection(decay=0.5), group_size=2)
    known.order(0)
    known.observe([QuestionOutcome("q3", 2, 0), QuestionOutcome("elsewhere", 1, 1)])
    assert known.uniform_share == pytest.approx(1 / 4)
    known.order(1)
    assert known.uniform_share == pytest.approx((39 / 4 + 10 / 48) / 40)
    known.order(1)  # a resumed epoch is not another one
    assert known.uniform_share == pytest.approx((39 / 4 + 10 / 48) / 40)
    known.order(2)  # one right response: Beta(3/2, 1/2), (3/2)(5/2) / 6 = 15/24 and 3/24
    assert known.uniform_share == pytest.approx((39 / 4 + 6 / 24) / 40)


def learned(outcomes=60):
    known = questions()
    generator = np.random.default_rng(1)
    known.order(0)
    known.observe(QuestionOutcome(f"q{i % 40}", n := int(generator.integers(9)), 8 - n) for i in range(outcomes))
    known.order(1)
    known.observe([QuestionOutcome("q1", 3, 5)])
    return known


def test_what_is_known_survives_a_checkpoint_whatever_has_become_of_the_questions():
    known, restored = learned(), questions()
    restored.observe([QuestionOutcome("q5", 1, 7)])  # of a run that the checkpoint replaces
    restored.load_state_dict(known.state_dict())
    assert restored.order(1) == known.order(1)
    assert restored.order(2) == known.order(2)
    fewer = questions(prompts=PROMPTS[20::-1])
    fewer.load_state_dict(learned().state_dict())
    before, after = contents(learned()), contents(fewer)
    assert len(after) == 21
    assert all(before[uid] == of_question for uid, of_question in after.items())


def contents(known):
    state = known.state_dict()
    return dict(zip(json.loads(state["uids"]), torch.hstack([state["known"], state["seen"]]).tolist(), strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_ask_what_one_does_in_the_same_order(ranks):
    def batches(number, rank):
        sampler = SelectedSampler(learned(), number, rank)
        sampler.set_epoch(2)
        return list(sampler)

    whole = batches(1, 0)
    of_ranks = [batches(ranks, rank) for rank in range(ranks)]
    taken = [question for turn in zip(*of_ranks, strict=True) for question in turn]
    assert taken[:40] == whole
    assert taken[40:] == whole[: len(taken) - 40]


@pytest.mark.parametrize("settings", [{"floor": 0.0}, {"floor": 1.5}, {"decay": -0.1}, {"decay": 1.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigurationError, match=r"data\.selection needs 0 < floor <= 1 and 0 <= decay <= 1"):
        InformativeSelection(**settings)


@pytest.mark.parametrize("weights", [[1.0] * 39, [0.0] + [1.0] * 39, [float("nan")] * 40])
def test_weights_that_cannot_be_used_are_told_with_their_class(weights):
    class Mine(QuestionSelection):
        def weights(self, right, wrong, group_size):
            return array(*weights)

    with pytest.raises(ConfigurationError, match=r"Mine\.weights must return a finite number above 0 for each of 40"):
        questions(Mine()).order(0)


def test_a_selection_has_an_order_of_its_own():
    with pytest.raises(ConfigurationError, match=r"drop data\.shuffle=false"):
        make_data(selection=InformativeSelection(), shuffle=False)


# -- whole runs -----------------------------------------------------------------------------------


class ByQuestion(Verifier):
    """A third of the questions is always solved, a third never, and the rest now and then."""

    isolated = False

    def verify(self, prompt, response, answer):
        kind = stable_hash(prompt) % 3
        return float(stable_hash(response) % 2 if kind == 2 else kind)


class Questions(Callback):
    """Notes the questions of every iteration, and how many of their groups had right and wrong members."""

    def __init__(self):
        self.batches = []
        self.mixed = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append([request.prompt.uid for request in batch])
        self.mixed.append(sum(0 < group.correct_count < 4 for group in module.groups))


def run(folder, iterations, selection, checkpoint=None, dynamic=None):
    """Epochs of six iterations with two questions each; returns what was noted, and the trainer."""
    noted = Questions()
    module = make_module(
        rewards=[UniformRandomReward()], verifier=ByQuestion(), max_response_tokens=4, dynamic_sampling=dynamic,
        sampling=Sampling(3.0), max_idle_iterations=0,
    )  # fmt: skip
    data = make_data(train=ArithmeticChain(size=12, seed=1), batch_size=2, selection=selection)
    settings = {"max_steps": -1, "max_epochs": -1} if dynamic else {"max_steps": iterations}
    trainer = make_trainer(folder, callbacks=[noted], **settings)
    if dynamic:
        trainer.callbacks.append(StopAfter(iterations))
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return noted, trainer


class StopAfter(Callback):
    """Ends a run after so many iterations, whatever number of updates they made."""

    def __init__(self, iterations):
        self.iterations = iterations

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = module.iteration == self.iterations


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        noted, _ = run(tmp_path_factory.mktemp("whole"), 13, InformativeSelection())
    assert len(set(chain(*noted.batches[:6]))) == 12
    assert len(set(chain(*noted.batches[6:12]))) < 12  # something has been learned
    return noted.batches


@pytest.mark.parametrize("stop", [6, 9])
def test_a_resumed_run_asks_what_the_uninterrupted_one_asks(tmp_path, whole, stop):
    first, trainer = run(tmp_path / "first", stop, InformativeSelection())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = run(tmp_path / "rest", 13, InformativeSelection(), checkpoint=str(tmp_path / "a.ckpt"))
    assert first.batches + rest.batches == whole


def test_a_checkpoint_without_a_selection_goes_on_with_one_that_knows_nothing(tmp_path):
    _, trainer = run(tmp_path / "first", 6, None)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = run(tmp_path / "rest", 12, InformativeSelection(), checkpoint=str(tmp_path / "a.ckpt"))
    assert len({uid for batch in rest.batches for uid in batch}) == 12


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_dynamic_sampling_wastes_fewer_groups_and_the_log_says_what_uniform_questions_would_do(tmp_path):
    dynamic = DynamicSampling(max_refills=20)
    plain, _ = run(tmp_path / "plain", 30, None, dynamic=dynamic)
    chosen, trainer = run(tmp_path / "chosen", 30, InformativeSelection(), dynamic=dynamic)
    assert sum(chosen.mixed[12:]) > 1.3 * sum(plain.mixed[12:])
    assert trainer.global_step > 0
    rows = metrics(tmp_path / "chosen")
    expected = [float(row["rollout/uniform_informative_share"]) for row in rows if row["rollout/informative_share"]]
    assert expected[:6] == pytest.approx([1 - 2 * 35 / 128] * 6)  # groups of 4, nothing known: E[p⁴] = C(8,4) / 4⁴ / 2
    observed = sum(plain.mixed[12:]) / 36
    assert expected[-1] == pytest.approx(observed, abs=0.15)
    assert "rollout/uniform_informative_share" not in metrics(tmp_path / "plain")[0]
