"""The README's embedding example runs as it stands, in at most 15 statements' lines."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoModelForCausalLM

README = Path(__file__).parents[2] / "README.md"


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return code


def test_the_embedding_example_is_short():
    assert len([line for line in example().splitlines() if line.strip()]) <= 15


def test_the_embedding_example_trains_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(compile(example(), "README.md", "exec"), variables)  # the example is ours
    assert variables["trainer"].global_step == 2
    assert len(variables["cache"].cache) == 16
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


def test_every_place_of_the_map_exists():
    root = README.parent
    section = README.read_text().split("## Map")[1]
    names = re.findall(r"`([\w/]+\.py|[\w]+/)`", section)
    assert len(names) > 15
    for name in names:
        assert (root / name).exists() or (root / "rpo_lightning" / name).exists(), name
