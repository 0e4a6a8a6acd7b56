"""Shared fixtures: the embedded reasoner as the policy, small problems as data, quiet trainers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from rpo_lightning import RPODataModule, RPOModule
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cli.quiet import HARMLESS_WARNINGS, HarmlessWarning
from rpo_lightning.core.types import Completion, Group, Prompt, RolloutRequest, Sample
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.prefix_sharing import attention, gpu
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rewards import AccuracyReward, ExactMatchVerifier
from rpo_lightning.update.settings import UpdateSettings
from tests.policy.prefix_sharing.dense_kernels import dense_attend, dense_attend_backward

REASONER = "embedded:arithmetic-reasoner"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def pytest_configure(config):
    """Ignore the warnings that the command line ignores, and those that only tests cause."""
    of_tests = (
        # Tests put several runs into one folder.
        HarmlessWarning("Experiment logs directory .* exists and is not empty", UserWarning, r"lightning\."),
        HarmlessWarning("Checkpoint directory .* exists and is not empty", UserWarning, r"lightning\."),
        # Tests resume without the callback that wrote the checkpoint: it holds nothing that they need.
        HarmlessWarning("Be aware that when using `ckpt_path`, callbacks", UserWarning, r"lightning\."),
    )
    for message, category, module in (*HARMLESS_WARNINGS, *of_tests):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}:{module}")


def pytest_collection_modifyitems(items):
    """Begin with long files, and let the slow tests take their time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(0))


class Processes:
    """The processes that a test has started. Those of earlier tests and of libraries (trackers) do not count."""

    def __init__(self) -> None:
        self._others = self._all()

    def now(self) -> set[psutil.Process]:
        """Those that there are, with the processes that they have started."""
        return self._all() - self._others

    @staticmethod
    def _all() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))


@pytest.fixture
def processes():
    """The processes that the test starts; see ``Processes``."""
    # Python starts it for the first test that needs it, and keeps it. It must not be this one.
    resource_tracker.ensure_running()
    return Processes()


@pytest.fixture(autouse=True)
def _fixed_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(REASONER)


@pytest.fixture
def policy():
    return load_policy(REASONER)


@pytest.fixture
def exact_policy():
    """A tiny model that computes in fp64 throughout (transformers' RMSNorm would go through fp32)."""
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=None, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Starcoder2ForCausalLM(config).double()


@pytest.fixture
def packed(monkeypatch):
    """Packed rows wherever rows are shared, computed densely; counts the calls of the kernel."""
    calls = []

    def attend(q, k, v, sequences, scale):
        calls.append(sequences)
        return dense_attend(q, k, v, sequences, scale)

    monkeypatch.setattr(gpu, "_attend", attend)
    monkeypatch.setattr(gpu, "_attend_backward", dense_attend_backward)
    monkeypatch.setattr(attention, "takes", lambda *_: True)
    return calls


def make_group(
    rewards: Sequence[float],
    suffixes: Sequence[Sequence[int]] | None = None,
    prompt_ids: Sequence[int] = (1, 5, 6),
    prefix_ids: Sequence[int] = (),
    correct: Sequence[bool] | None = None,
    finished: Sequence[bool] | None = None,
    uid: str = "q",
    cached_length: int = 0,
    step: int = 0,
) -> Group:
    """A scored group made by hand."""
    suffixes = suffixes or [(7, 8, 2)] * len(rewards)
    correct = correct if correct is not None else [r > 0 for r in rewards]
    finished = finished if finished is not None else [True] * len(rewards)
    request = RolloutRequest(
        Prompt(uid, "question", tuple(prompt_ids), "0"), tuple(prefix_ids), 8, cached_length, ((0, len(prefix_ids)),)
    )
    return Group(
        request=request,
        completions=[Completion(tuple(s), (0.0,) * len(s), done) for s, done in zip(suffixes, finished, strict=True)],
        samples=[
            Sample("question", "text", "0", len(prefix_ids) + len(s), done, float(right), uid)
            for s, done, right in zip(suffixes, finished, correct, strict=True)
        ],
        rewards=list(rewards),
        step=step,
    )


def passes_with_gradient(model: Any) -> list[int]:
    """Indices of the decoder layers in the order in which they are computed with gradient; it grows as they are.

    A layer that is checkpointed is computed once in the forward pass and once more in the backward pass.
    """
    computed: list[int] = []

    def note(index: int) -> None:
        if torch.is_grad_enabled():
            computed.append(index)

    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, index=index: note(index))
    return computed


def cache_contents(cache: ExperienceCache) -> list[tuple[Any, ...]]:
    """All that a cache remembers, wherever its tokens lie."""
    return [("shared by all", cache.shared)] + [
        (
            e.uid,
            e.visits,
            e.restart,
            e.state,
            [a and (a.token_ids.tolist(), a.reward, a.correct, a.finished, a.spans) for a in e.slots],
        )
        for e in cache
    ]


def make_module(**settings: Any) -> RPOModule:
    """A module on the embedded reasoner, with small groups of short responses; takes fields of ``update`` too."""
    defaults: dict[str, Any] = {
        "policy": REASONER,
        "rewards": [AccuracyReward()],
        "verifier": ExactMatchVerifier(),
        "group_size": 4,
        "max_response_tokens": 256,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    }
    return RPOModule(**with_update({**defaults, **settings}))


def with_update(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a module, those of the update among them gathered in one object."""
    names = {field.name for field in dataclasses.fields(UpdateSettings)}
    update = {name: settings[name] for name in names & settings.keys()}
    rest = {name: value for name, value in settings.items() if name not in names}
    return {"update": UpdateSettings(**update), **rest}


def make_data(**settings: Any) -> RPODataModule:
    """A few problems, answered in some 190 tokens each."""
    defaults: dict[str, Any] = {
        "train": ArithmeticChain(size=16, seed=1),
        "val": ArithmeticChain(size=8, seed=2),
        "batch_size": 4,
    }
    return RPODataModule(**{**defaults, **settings})


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    """A quiet trainer on the CPU that logs every step into ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "max_epochs": -1,
        "logger": CSVLogger(folder, name=None, version=""),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**{**defaults, **settings})
