"""What ends a response does so wherever responses are sampled."""

from __future__ import annotations

import pytest

from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.policy.tokenizer import decode
from rpo_lightning.rollout import Sampling
from tests.conftest import make_data, make_module, make_trainer


def test_a_stop_text_holds_in_training_in_evaluation_and_while_the_cache_is_filled(tmp_path, tokenizer):
    module = make_module(stop=["d"], evaluation=EvaluationSettings(Sampling(0.7)))
    cache = ExperienceCacheCallback(initial_sampling=Sampling(0.9), initialisation="eager")
    make_trainer(tmp_path, max_steps=1, callbacks=[cache]).fit(module, datamodule=make_data())
    filled = [decode(tokenizer, entry.response.token_ids.tolist()) for entry in cache.cache]
    trained = [sample.response for group in module.groups for sample in group.samples if sample.finished]
    for texts in (filled, trained):
        stopped = [text for text in texts if "d" in text]  # some leave the step out
        assert len(stopped) > len(texts) / 2 > 4
        assert all(text.index("d") == len(text) - 1 for text in stopped)
    make_trainer(tmp_path, limit_val_batches=1).validate(module, datamodule=make_data(), verbose=False)
    (evaluation,) = module.evaluations
    assert evaluation.means()["response_tokens"] < 100


@pytest.mark.parametrize("stop", [[""], [45], [-1]])
def test_a_stop_that_can_never_end_a_response_is_refused(stop):
    with pytest.raises(ConfigurationError, match=r"model\.stop has .*: give texts, or token ids from 0 to 44"):
        make_module(stop=stop)


def test_a_text_is_no_list_of_characters_that_stop():
    with pytest.raises(ConfigurationError, match=r"model\.stop='dog' is no list: write \['dog'\]"):
        make_module(stop="dog")
