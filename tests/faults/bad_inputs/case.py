"""A bad input: what it is, the command that meets it, and the line that the command must end with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RUN_FILE = "run.yaml"
# What every command of the table that needs a policy and data is given: a run of seconds.
RUN = """\
model:
  policy: embedded:arithmetic-reasoner
  rewards: [AccuracyReward]
  verifier: ExactMatchVerifier
  group_size: 3
  max_response_tokens: 64
data:
  train: {class_path: ArithmeticChain, init_args: {size: 8, operations: 3}}
  batch_size: 4
trainer: {accelerator: cpu, devices: 1, max_steps: 1, logger: false, enable_progress_bar: false}
"""
# Stands for any text in an expected line, where another library or the machine words it.
ANYTHING = "…"


@dataclass(frozen=True)
class BadInput:
    """A row of the table.

    Attributes:
        what: The input, as the documents call it.
        command: The words after ``rpo-lightning``.
        line: What follows ``rpo-lightning: error: ``; ``…`` stands for any text.
        files: Files of the working directory, by name: text, bytes, or lines of JSON.
        make: Makes what cannot be written as text, in the working directory.
    """

    what: str
    command: str
    line: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Callable[[], None] | None = None

    @property
    def arguments(self) -> list[str]:
        """The command's words."""
        return shlex.split(self.command)

    def prepare(self) -> None:
        """Write the files into the working directory."""
        Path(RUN_FILE).write_text(RUN)
        for name, content in self.files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        if self.make is not None:
            self.make()

    def matches(self, line: str) -> bool:
        """Whether a line is the expected one."""
        pattern = ".+".join(re.escape(part) for part in self.line.split(ANYTHING))
        return re.fullmatch(pattern, line) is not None


def run(command: str, *words: str) -> str:
    """A command on the run of ``run.yaml``, with further words."""
    return " ".join([command, "--config", RUN_FILE, *words])
