"""Every objective, advantage estimator and importance correction trains a policy, chosen as a user chooses it."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.rewards import AccuracyReward, UniformRandomReward
from rpo_lightning.update.advantages import GDPO, RLOO, MaxRL, ReinforcePlusPlus, ReinforcePlusPlusBaseline
from rpo_lightning.update.importance import GeometricMasked, IcePop
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO, DPPO, DPPOKL, SAPO, GSPOToken
from tests.cli.test_cli import SMALL, last_run, parse
from tests.conftest import make_data, make_module, make_trainer
from tests.documents import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    "method",
    [
        {"objective": SAPO()},
        {"objective": DPPO(1e-3)},
        {"objective": DPPOKL(1e-5)},
        {"objective": GSPOToken(0.2, 0.2)},
        {"objective": DAPO(entropy_bonus=0.01)},
        {"advantages": MaxRL()},
        {"advantages": GDPO()},
        {"advantages": RLOO()},
        {"advantages": ReinforcePlusPlus()},
        {"advantages": ReinforcePlusPlusBaseline()},
        {"importance_correction": IcePop()},
        {"importance_correction": GeometricMasked()},
    ],
    ids=lambda m: type(next(iter(m.values()))).__name__,
)
def test_a_run_trains_with_what_its_settings_say(tmp_path, method, monkeypatch):
    given = []
    backward = PolicyLoss.backward

    def note(self, groups, advantages, *args):
        given.append((list(groups), list(advantages)))
        return backward(self, groups, advantages, *args)

    monkeypatch.setattr(PolicyLoss, "backward", note)
    module = make_module(
        rewards=[AccuracyReward(), UniformRandomReward(weight=0.5)],
        max_response_tokens=24,
        passes_per_rollout=2,
        **method,
    )
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.loaded_policy.named_parameters()}
    make_trainer(tmp_path, max_steps=4).fit(module, datamodule=make_data(batch_size=2))
    log = pd.read_csv(tmp_path / "metrics.csv")
    assert (log["loss/grad_norm"].dropna() > 0).all()
    after = dict(module.loaded_policy.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert any((after[n] - p).abs().max() > 1e-5 for n, p in before.items())
    # Both updates of a rollout have the advantages that the estimator gives for it.
    weights = {"accuracy": 1.0, "uniform_random": 0.5}
    for groups, advantages in given:
        expected = module._advantages.advantages(groups, weights, Ranks())
        assert len(groups) == 2
        torch.testing.assert_close(advantages, expected)
    if isinstance(module.objective, DPPO):
        assert 0 < log["loss/clip_share"].iloc[-1] < 1  # the second update of a rollout has moved away
    assert log["mismatch/masked_share"].iloc[-1] == 0.0


def test_methods_are_chosen_by_name_with_their_settings():
    cli = parse(
        QUICKSTART, "--model.objective", "SAPO", "--model.objective.tau_neg", "1.5",
        "--model.objective.entropy_bonus", "0.1", "--model.update.advantages", "RLOO",
        "--model.update.importance_correction", "IcePop", "--model.update.importance_correction.upper", ".inf",
    )  # fmt: skip
    objective, update = cli.model.objective, cli.model.update
    assert isinstance(objective, SAPO)
    assert (objective.tau_neg, objective.entropy_bonus) == (1.5, 0.1)
    assert isinstance(update.advantages, RLOO)
    assert isinstance(update.importance_correction, IcePop)
    assert update.importance_correction.upper == math.inf


@pytest.mark.parametrize("section", ["model", "model.update"])
def test_the_setting_of_earlier_releases_is_told_with_its_new_name(section):
    with pytest.raises(ConfigurationError) as error:
        parse(QUICKSTART, f"--{section}.advantage_scale", "batch")
    assert str(error.value) == (
        f"{section}.advantage_scale is called model.update.advantages (GroupScaled, BatchScaled or Unscaled instead of "
        "group, batch or none) now"
    )


def test_a_recipe_of_several_methods_runs_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([
        "fit", *SMALL, "--model.objective", "DPPO", "--model.objective.entropy_bonus", "0.01",
        "--model.update.advantages", "MaxRL", "--model.update.passes_per_rollout", "2",
    ])  # fmt: skip
    log = pd.read_csv(last_run() / "metrics.csv")
    assert log["loss/entropy"].dropna().gt(0).all()
