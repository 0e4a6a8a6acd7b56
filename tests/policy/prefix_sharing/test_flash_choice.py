"""``model.flash_attention`` without a GPU; ``tests/runs/pretend_gpu/claims_flash.py`` has the rest."""

from __future__ import annotations

import pytest

from rpo_lightning.core.errors import ConfigurationError
from tests.conftest import make_data, make_module, make_trainer


def test_the_setting_is_checked_before_anything_is_loaded():
    with pytest.raises(
        ConfigurationError, match=r"model.flash_attention must be null or one of FA2, FA3, FA4; got 'x'"
    ):
        make_module(flash_attention="x")


@pytest.mark.parametrize("name", ["FA2", "FA3", "FA4"])
def test_a_choice_is_refused_on_a_cpu(tmp_path, name):
    told = rf"^model.flash_attention={name}: it needs an NVIDIA GPU, and the policy is on 'cpu'; set it to null$"
    with pytest.raises(ConfigurationError, match=told):
        make_trainer(tmp_path, max_steps=1).fit(make_module(flash_attention=name), datamodule=make_data())
