"""Writes ``docs/bad_input.md`` from the table of bad inputs: ``python -m tests.faults.bad_inputs.page``."""

from __future__ import annotations

from pathlib import Path

from tests.faults.bad_inputs import SECTIONS, BadInput
from tests.faults.bad_inputs.case import RUN

PAGE = Path(__file__).parents[3] / "docs" / "bad_input.md"

_HEAD = f"""\
# Bad input

A config, a row, a cache file, a model folder or a checkpoint that cannot work ends a command with one line and exit code 2. The
line says what is wrong, where, and what to do:

```text
rpo-lightning: error: bad.jsonl, line 2: malformed JSON (Expecting ':' delimiter): write one object a line
```

It comes before long work begins: before the policy is loaded where that is possible, and always before anything is sampled. Files
that were there stay as they were. A single row of questions that cannot be used does not end a run: it is left out, counted and
told. The table below has what ends one.

## What is believed

Questions, tables of responses, cache files, model folders and checkpoints may come from elsewhere. Nothing that they hold is
executed.

- `model.trust_remote_code` is off. A model or tokenizer that brings Python code is refused, and so it is in `rpo-lightning memory`
  and `rpo-lightning cache show`. With `model.trust_remote_code: true` the tokenizer, the policy and the engine execute that code with
  all of your rights: read it first.
- Checkpoints hold tensors and plain values only, and commands read them with torch's `weights_only=True`. In Python, give that to
  the trainer too, beside `ckpt_path`. An exception: DeepSpeed reads the folders of its own checkpoints with pickle. Resume a
  DeepSpeed run from checkpoints that you trust.
- Weights in pickle files are read without objects; safetensors files never hold any.
- Settings come from configs and arguments, never from a checkpoint.
- A path or an address in a row, as of an image, is text. It is not opened.
- Cache files and the caches of checkpoints are checked as a whole: token ids within the vocabulary, spans that add up, finite
  rewards, notes that the cut can use. What a file declares to hold is compared with the machine's memory before it is read.
- Configs are plain YAML, without tags that make objects. But a config names classes and functions, which are imported: treat it like
  a program.

## The lines

Every command runs in a folder with this config under the name run.yaml:

```text
{RUN}```

`…` stands for what another library words, or for what depends on the machine. `tests/faults/test_bad_input.py` runs every row;
`python -m tests.faults.bad_inputs.page` writes this page from the same table.
"""


def text() -> str:
    """The page."""
    parts = [_HEAD]
    for name, cases in SECTIONS.items():
        parts += [f"\n### {name}\n", "| input | command | line |", "| --- | --- | --- |"]
        parts += [_row(case) for case in cases]
    return "\n".join(parts) + "\n"


def _row(case: BadInput) -> str:
    return f"| {case.what} | {_cell(case.command)} | {_cell(case.line)} |"


def _cell(words: str) -> str:
    """Text as it is typed or printed; a bar would end the cell, and a backtick the text."""
    shown = words.replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" if shown else "nothing"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
