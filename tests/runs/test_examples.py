"""The examples in the documents run as they stand: Python in tiny runs, configs through the command line's parser."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from ruff import find_ruff_bin
from transformers import AutoModelForCausalLM

from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule
from tests.documents import PAGES, ROOT, blocks, examples, write_files
from tests.known_settings import SECTIONS

README = ROOT / "README.md"
OWN_PARTS = ROOT / "docs" / "your_own_parts.md"


def pages_with(language: str) -> Any:
    pages = [page for page in PAGES if page.suffix == ".md" and blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A working folder with ``my_parts.py``, which is forgotten after the test."""
    write_files(OWN_PARTS, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_parts", None)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # no validation set
@pages_with("python")
def test_the_examples_of_a_page_run(page, own_parts, tmp_path):
    variables: dict[str, Any] = {}
    for example in examples(page):
        if not example.file and not example.not_run:
            exec(compile(example.code, str(page), "exec"), variables)  # the examples are ours
    if "trainer" in variables:
        assert variables["trainer"].global_step == variables["trainer"].max_steps
        assert len(variables["cache"].cache) > 0
    if page == README:
        AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


@pages_with("python")
def test_the_names_in_examples_exist_where_they_cannot_be_run_too(page, own_parts):
    """Every name is defined, and what is called with names of arguments has them."""
    code = "\n".join(example.code for example in examples(page))
    checked = subprocess.run(
        [find_ruff_bin(), "check", "--isolated", "--select=F821,F823", "--output-format=concise", "-"],
        input=code, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    for example in examples(page):
        assert unknown_arguments(example.code) == []


def unknown_arguments(code: str) -> list[str]:
    """Arguments given by name that an imported function or class does not take; fails if there is no such module."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    imported = {
        alias.asname or alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    unknown = []
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]:
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in imported:
            known = inspect.signature(imported[name]).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                unknown += [f"{name}({k.arg})" for k in call.keywords if k.arg not in known]
    return unknown


def test_a_wrong_argument_in_an_example_is_noticed():
    code = "from rpo_lightning.cache import AnchoredCut\nAnchoredCut(low=0.1, middle=0.2)"
    assert unknown_arguments(code) == ["AnchoredCut(middle)"]


@pages_with("yaml")
def test_configs_in_a_page_are_accepted(page, own_parts, tmp_path):
    for block in blocks(page, "yaml"):
        config = yaml.safe_load(block)
        assert config.keys() <= SECTIONS.keys(), "a block of YAML is a part of a config"
        config.setdefault("model", {})["policy"] = "embedded:arithmetic-reasoner"
        config.setdefault("trainer", {}).update(accelerator="cpu", devices=1, precision="32-true", logger=False)
        (tmp_path / "part.yaml").write_text(yaml.safe_dump(config))
        cli = RPOCLI(
            RPOModule, RPODataModule, run=False,
            args=["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", "part.yaml"],
            auto_configure_optimizers=False, save_config_callback=None,
        )  # fmt: skip
        assert isinstance(cli.model, RPOModule)


def test_the_embedding_example_is_short():
    (example,) = examples(README)
    assert len([line for line in example.code.splitlines() if line.strip()]) <= 15


def test_the_map_names_every_room_and_nothing_else():
    package = ROOT / "rpo_lightning"
    section = README.read_text().split("## Map")[1].split("## More")[0]
    rooms = re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE)
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(rooms) == folders | {"module.py"}
    for name in re.findall(r"`([\w/]+/|[\w/]+\.py)`", section.replace("rpo_lightning/", "")):
        assert not name or (package / name).exists(), name


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 130
