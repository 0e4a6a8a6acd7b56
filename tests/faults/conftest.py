"""The process that forks runs, a micro policy, and the run that nothing happens to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_lightning.policy.export import save_policy
from rpo_lightning.policy.tokenizer import load_tokenizer
from tests.conftest import REASONER
from tests.faults.runs import ROOT, TWO_RANKS, VLLM, Runs, arguments


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    forking = Runs()
    yield forking
    forking.close()


@pytest.fixture(scope="session")
def micro_policy(tmp_path_factory) -> Path:
    """A policy of some thousand random weights, with the reasoner's tokenizer."""
    return make_policy(tmp_path_factory.mktemp("policy"), head_dim=8)


@pytest.fixture(scope="session")
def micro_policy_for_vllm(tmp_path_factory) -> Path:
    """The same with heads that vLLM's kernels on a CPU can compute."""
    return make_policy(tmp_path_factory.mktemp("policy-for-vllm"), head_dim=32)


def make_policy(folder: Path, head_dim: int) -> Path:
    """A policy of random weights, in a folder."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=head_dim, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    save_policy(LlamaForCausalLM(config), load_tokenizer(REASONER), folder)
    torch.set_rng_state(state)
    return folder


@pytest.fixture(scope="session")
def whole(runs, micro_policy, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert runs.run(folder, arguments(folder, micro_policy)) == [0], (folder / "output.txt").read_text()[-3000:]
    return folder


@pytest.fixture(scope="session")
def whole_of_two(runs, micro_policy, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole-of-two")
    command = arguments(folder, micro_policy, TWO_RANKS)
    assert runs.run(folder, command, ranks=2) == [0, 0], (folder / "output.txt").read_text()[-3000:]
    return folder


@pytest.fixture(scope="session")
def whole_with_vllm(runs, micro_policy_for_vllm, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with rollouts on vLLM."""
    folder = tmp_path_factory.mktemp("whole-with-vllm")
    command = arguments(folder, micro_policy_for_vllm, VLLM)
    assert runs.run(folder, command) == [0], (folder / "output.txt").read_text()[-3000:]
    return folder


class Outcomes:
    """The recorded outcome of the matrix. A row replaces an earlier one of its point."""

    PATH = ROOT / "benchmarks" / "results" / "kill_matrix.json"
    KEY = ("ranks", "engine", "phase", "point")

    def __init__(self) -> None:
        rows = json.loads(self.PATH.read_text())["rows"] if self.PATH.exists() else []
        self._rows = {tuple(row[name] for name in self.KEY): row for row in rows}

    def add(self, wrong: str | None, **row: Any) -> None:
        """Record a cell: what was wrong, if anything."""
        sys.path.append(str(ROOT / "benchmarks"))
        from common.machine import hardware

        self._rows[tuple(row[name] for name in self.KEY)] = {**row, "outcome": wrong or "bit-identical"}
        rows = list(self._rows.values())
        same = sum(row["outcome"] == "bit-identical" for row in rows)
        figures = {"hardware": hardware(), "points": len(rows), "bit_identical": same, "rows": rows}
        self.PATH.write_text(json.dumps(figures, indent=1) + "\n")


@pytest.fixture(scope="session")
def outcomes() -> Outcomes:
    return Outcomes()
