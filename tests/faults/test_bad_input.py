"""Every bad input of the table gets its one line, through the command line, and loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpo_lightning.cli.main import main
from rpo_lightning.rollout import policy_module
from tests.faults.bad_inputs import SECTIONS, BadInput
from tests.faults.bad_inputs.case import RUN, RUN_FILE
from tests.faults.bad_inputs.page import PAGE, text
from tests.faults.bad_inputs.policies import EXECUTED, folder

# Many rows of these meet the same few lines of code.
_SLOW = {"Rows of questions", "Classes"}
# What a run leaves that was refused after its folder was made.
_LEFT = {"config.yaml"}


def _cases() -> list[Any]:
    return [
        pytest.param(case, id=case.what, marks=[pytest.mark.slow] if section in _SLOW else [])
        for section, cases in SECTIONS.items()
        for case in cases
    ]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def loaded(monkeypatch):
    """The policies that were loaded."""
    names = []
    load = policy_module.load_policy

    def noting(name: str, *args: Any, **options: Any) -> Any:
        names.append(name)
        return load(name, *args, **options)

    monkeypatch.setattr(policy_module, "load_policy", noting)
    return names


def _contents() -> dict[str, bytes]:
    paths = [path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("case", _cases())
def test_a_bad_input_gets_one_line_and_loses_nothing(case: BadInput, capsys, loaded):
    case.prepare()
    before = _contents()
    loaded.clear()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(case.arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err.partition("rpo-lightning: error: ")[2].splitlines()
    assert len(printed) == 1, printed
    assert case.matches(printed[0]), printed[0]
    assert not loaded
    after = _contents()
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() <= _LEFT
    assert not Path(EXECUTED).exists()


def test_the_page_of_bad_inputs_is_current():
    assert PAGE.read_text(encoding="utf-8") == text(), "run: python -m tests.faults.bad_inputs.page"


def test_every_bad_input_has_a_name_of_its_own():
    names = [case.what for cases in SECTIONS.values() for case in cases]
    assert len(names) == len(set(names)) >= 60


def test_code_that_is_trusted_makes_the_policy_that_trains():
    folder(_own_classes)()
    Path(RUN_FILE).write_text(RUN)
    command = ["fit", "--config", RUN_FILE, "--model.policy", "./model"]
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--model.trust_remote_code", "true"])
    assert Path(EXECUTED).exists()
    assert Path("policy/model.safetensors").exists()


def _own_classes(model: Path) -> None:
    from tests.faults.bad_inputs.policies import edited

    (model / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(Path(EXECUTED).absolute())!r}, 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edited("config.json", model_type="mine", auto_map=names)(model)
