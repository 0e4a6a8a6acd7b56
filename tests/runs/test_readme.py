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


def test_the_map_names_every_room_and_nothing_else():
    package = README.parent / "rpo_lightning"
    section = README.read_text().split("## Map")[1].split("## More")[0]
    rooms = re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE)
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(rooms) == folders | {"module.py"}
    for name in re.findall(r"`([\w/]+/|[\w/]+\.py)`", section.replace("rpo_lightning/", "")):
        assert not name or (package / name).exists(), name


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 130
