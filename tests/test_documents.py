"""What the documents name exists: imports, modules, classes, metrics, files, links, settings, commands, options."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rpo_lightning.cli.cache.build import BuildCacheCallback
from rpo_lightning.cli.cache.export_import import ExportSettings, ImportSettings
from rpo_lightning.cli.cache.show import show, stats
from rpo_lightning.cli.commands import COMMANDS
from rpo_lightning.cli.main import main
from rpo_lightning.cli.plan.settings import PlanSettings
from rpo_lightning.cli.report.report import write_report
from rpo_lightning.cli.segments.results import SegmentResultsCallback
from rpo_lightning.policy.prefix_sharing.flash_choice import FlashAttention
from tests.documents import PACKAGE, PAGES, ROOT, blocks, prose, quoted, shell_lines, text_of
from tests.known_settings import SECTIONS, is_setting, settings_of

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"

# What commands take besides settings.
OPTIONS: dict[str, Any] = {
    "cache build": BuildCacheCallback,
    "cache import": ImportSettings,
    "cache export": ExportSettings,
    "cache show": show,
    "cache stats": stats,
    "plan": PlanSettings,
    "segments": SegmentResultsCallback,
    "report": write_report,
}
OF_EVERY_COMMAND = {"config", "print_config", "ckpt_path", "seed_everything", "help"}
# Files that runs leave behind, or that readers write, with endings of the repository's.
OF_RUNS_AND_READERS = {"evaluation.md", "config.yaml", "my_parts.py"}
FILE_ENDINGS = (".py", ".md", ".yaml", ".toml", ".jsonl", ".json", ".parquet", ".png", ".html", ".csv")
# Words that stand for the reader's own, and what other libraries have.
PLACEHOLDERS = {"CONFIG", "CHECKPOINT", "FOLDER", "LARGER", "NAME", "HOST", "COMMAND", "PATH"}
OTHER_MODULES = ("lightning.pytorch", "lightning.pytorch.strategies", "lightning.pytorch.callbacks")
OTHER_CLASSES = {"EngineArgs", "GRPOConfig", "None", *get_args(FlashAttention)}


@every_page
def test_dotted_names_of_the_package_resolve(page):
    for name in set(re.findall(r"\brpo_lightning(?:\.[A-Za-z_]\w*)+", text_of(page))):
        found: Any = importlib.import_module("rpo_lightning")
        for part in name.split(".")[1:]:
            found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")


@cache
def source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))


@every_page
def test_classes_in_backticks_exist(page):
    others = [importlib.import_module(name) for name in OTHER_MODULES]
    names = {match[1] for name in quoted(page) if (match := re.fullmatch(r"([A-Z]\w+)(?:\(.*\))?", name))}
    for name in names - PLACEHOLDERS - OTHER_CLASSES:
        is_ours = re.search(rf"^(?:class {name}\b|{name}\b.* = )", source(), re.MULTILINE)
        assert is_ours or any(hasattr(module, name) for module in others), name


@every_page
def test_metrics_are_logged(page):
    groups = "reward|rollout|loss|mismatch|cache|time|tokens|val"
    names = {name for text in quoted(page) for name in re.findall(rf"^(?:{groups})/(\w+)$", text)}
    for row in re.findall(rf"^\| `(?:{groups})/…` \| (.*)", prose(page), re.MULTILINE):
        names |= set(re.findall(r"`(\w+)`", row))
    for name in names - {"NAME"}:
        assert re.search(rf'["/]{name}"', source()), name


# -- files and links ------------------------------------------------------------------------------


@every_page
def test_paths_in_backticks_exist(page):
    folders = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir()) if path.is_dir()} - {"runs", "models"}
    for name in quoted(page):
        if not re.fullmatch(r"[\w./*-]+", name) or Path(name).name in OF_RUNS_AND_READERS:
            continue
        in_a_folder = "/" in name and name.partition("/")[0] in folders and name.endswith(("/", *FILE_ENDINGS))
        if in_a_folder or name.endswith((".py", ".md", ".yaml", ".toml")):
            assert any(list(folder.glob(name)) for folder in (ROOT, PACKAGE, page.parent)), name


@every_page
def test_paths_in_commands_exist(page):
    for line in shell_lines(page):
        for before, name in re.findall(r"(\S+)[ =]((?:configs|benchmarks|docs|tests)/[\w./-]*)", line):
            assert before == "--out" or (ROOT / name).exists(), name


@every_page
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize(("folder", "pattern"), [("docs", "*.md"), ("docs/api", "*.md"), ("configs", "*.yaml")])
def test_the_index_of_a_folder_lists_every_page(folder, pattern):
    index = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / folder).glob(pattern)} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_the_readme_lists_the_pages_of_the_index():
    listed, index = (set(re.findall(r"\]\(([\w/.-]+)\)", page.read_text())) for page in (README, INDEX))
    there = {str((INDEX.parent / name).resolve().relative_to(ROOT)) for name in index}
    assert there - listed == set()


def test_the_menu_of_the_site_lists_every_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\nvalidation:")[0]
    listed = re.findall(r": (\S+\.md)$", menu, re.MULTILINE)
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.suffix == ".md"]
    assert sorted(listed) == sorted([*pages, "CHANGELOG.md"])


def test_the_api_pages_show_every_room_that_exports_something():
    shown = set(re.findall(r"^::: ([\w.]+)", "\n".join(map(text_of, (ROOT / "docs/api").glob("*.md"))), re.MULTILINE))
    exporting = [path.parent for path in PACKAGE.glob("*/**/__init__.py") if "__all__" in path.read_text("utf-8")]
    rooms = {".".join(folder.relative_to(ROOT).parts) for folder in exporting if PACKAGE / "cli" not in folder.parents}
    assert "rpo_lightning.update.objectives" in rooms
    assert rooms - shown == set()


def test_docstrings_name_things_as_markdown_does():
    """The API pages are made from them."""
    assert re.findall(r":(?:class|meth|func|mod|attr|data):`[^`]*`", source()) == []


# -- messages -------------------------------------------------------------------------------------


@cache
def messages() -> list[str]:
    """The texts in the code, with ``…`` for what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
    return found


def is_a_message(text: str) -> bool:
    """Whether a text of the code has the parts between the ``…``, in order."""
    return any(has_in_order(message, [part.strip() for part in text.split("…")]) for message in messages())


def has_in_order(text: str, parts: list[str]) -> bool:
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def test_messages_in_the_documents_are_those_of_the_code():
    page = prose(ROOT / "docs" / "troubleshooting.md")
    told = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(told) > 40
    assert [message for message in told if not is_a_message(message)] == []


def test_a_message_that_there_is_not_is_noticed():
    assert is_a_message("… updates in a row were skipped, and the policy is as it was before: …")
    assert not is_a_message("… updates in a row were dropped, and the policy is as it was before: …")


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_says_what_it_is_for_and_what_it_needs(config):
    first, second = config.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("# Needs ")


# -- settings and commands ------------------------------------------------------------------------


def without_others_settings(text: str) -> str:
    """A page without its tables' columns of TRL's and verl's settings, and the sentences that name them."""
    text = re.sub(r"(?:TRL|verl)'s `[^`]+`", "", text)
    tables = re.split(r"\n(?=\| (?:TRL|verl) \|)", text)
    others = (re.sub(r"^\|[^|\n]*\|", "|", table, flags=re.MULTILINE) for table in tables[1:])
    return "\n".join([tables[0], *others])


@every_page
def test_settings_are_known_to_the_parser(page):
    text = without_others_settings(prose(page)) + "\n".join(blocks(page, "bash"))
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"(?<![\w./-])(?:--)?((?:{sections})(?:\.[a-z]\w*)+)", text))
    named = {name for name in named if not name.endswith(FILE_ENDINGS)}
    named = named.union(*(settings_of(yaml.safe_load(block)) for block in blocks(page, "yaml")))
    assert [name for name in sorted(named) if not is_setting(name)] == []


def test_a_setting_that_there_is_not_is_noticed():
    wrong = ["model.micro_batch_tokens", "model.update.micro_batch", "cache.cut.share", "cache.size", "data.tests"]
    right = ["model.update.micro_batch_tokens", "cache.cut.max_cut", "trainer.strategy.data_parallel_size"]
    assert [name for name in wrong + right if is_setting(name)] == right


@every_page
def test_commands_exist(page, capsys):
    main(["cache", "--help"])
    of_cache = set(re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert len(of_cache) == 5
    for line in shell_lines(page):
        for command, further in re.findall(r"rpo-lightning ([a-z]\w*)(?: ([a-z]\w*))?", line):
            assert command in COMMANDS, line
            assert command != "cache" or not further or further in of_cache, line


@every_page
def test_options_of_commands_exist(page):
    for line in shell_lines(page):
        command = re.search(r"(?:rpo-lightning|-m rpo_lightning) ((?:cache )?[a-z]\w*)(.*)", line)
        if command is None:
            continue
        known = OF_EVERY_COMMAND | SECTIONS.keys() | ({"gpu_memory_gib"} if command[1] == "memory" else set())
        if command[1] in OPTIONS:
            known |= set(inspect.signature(OPTIONS[command[1]]).parameters)
        assert [o for o in re.findall(r" --(\w+)(?![\w.-])", command[2]) if o not in known] == [], line


@every_page
def test_options_of_benchmarks_exist(page):
    for line in shell_lines(page):
        script = re.search(r"python (benchmarks/\w+\.py)(.*)", line)
        if script is not None:
            code = (ROOT / script[1]).read_text(encoding="utf-8")
            assert [o for o in re.findall(r" (--[\w-]+)", script[2]) if f'"{o}"' not in code] == [], line


@every_page
def test_targets_and_extras_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in shell_lines(page):
        assert set(re.findall(r"^make ([\w-]+)", line.strip())) <= targets, line
        for extras in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), line
