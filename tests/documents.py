"""The documents and what is written in them: blocks, examples, names in backticks, commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rpo_lightning"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "configs/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]


@cache
def text_of(page: Path) -> str:
    """The text of a page; of a config its comments."""
    text = page.read_text(encoding="utf-8")
    if page.name == "bad_input.md":  # what its tables name does not exist; they have a test of their own
        return text.partition("\n### ")[0]
    if page.suffix != ".yaml":
        return text
    return "\n".join(line.partition("# ")[2] for line in text.splitlines() if "# " in line)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, with a title or without."""
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A block of Python in a page.

    Attributes:
        code: The block.
        file: The file that the blocks of this title make up; empty for a block that is run by itself.
        not_run: What it needs to be run, where tests cannot: ``<!-- not run: a GPU -->`` above the block.
    """

    code: str
    file: str
    not_run: str


def examples(page: Path) -> list[Example]:
    """The blocks of Python in a page, in order."""
    block = r'(?:<!-- not run: ([^\n]*) -->\n)?^```python(?: title="([^"]+)")?\n(.*?)^```'
    found = re.findall(block, text_of(page), re.DOTALL | re.MULTILINE)
    assert [code for _, _, code in found] == blocks(page, "python"), f"{page}: a block of Python has an unknown head"
    return [Example(code, file, reason) for reason, file, code in found]


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page's examples make up into a folder."""
    for example in examples(page):
        if example.file:
            with (folder / example.file).open("a", encoding="utf-8") as file:
                file.write(example.code)


def prose(page: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def quoted(page: Path) -> set[str]:
    """What stands in backticks; a line break within is a space."""
    paragraphs = re.split(r"\n\s*\n|\n(?=[|-])", prose(page))
    return {" ".join(name.split()) for paragraph in paragraphs for name in re.findall(r"`([^`]+)`", paragraph)}


def shell_lines(page: Path) -> list[str]:
    """Commands in blocks and in backticks, a line each, without their comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#.*", "", line) for line in [*lines, *quoted(page)]]
