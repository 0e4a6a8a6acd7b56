"""The documents and what is written in them: blocks, names in backticks, commands."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rpo_lightning"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]


@cache
def text_of(page: Path) -> str:
    """The text of a page; of a config its comments."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".yaml":
        return text
    return "\n".join(line.partition("# ")[2] for line in text.splitlines() if "# " in line)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


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
