"""``rpo-lightning cache export`` and ``cache import``: their arguments, and what they print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh, RefreshRule
from rpo_lightning.cli.cache.exchange import exported_rows, import_responses, write_rows
from rpo_lightning.cli.cache.show import summary
from rpo_lightning.cli.commands import CACHE_COMMANDS
from rpo_lightning.cli.tool_cli import ToolCLI
from rpo_lightning.core.errors import CacheError, require_modules
from rpo_lightning.core.files import require_place
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.data.prompts import QUESTION_COLUMNS
from rpo_lightning.data.sources import as_source
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.rollout.policy_module import PolicyModule


@dataclass
class ExportSettings:
    """Arguments of ``cache export``.

    Attributes:
        path: The cache file.
        out: A ``.parquet`` or ``.jsonl`` file, or a folder for ``datasets.load_from_disk``.

    Raises:
        CacheError: ``out`` is a file of another kind.
        ConfigurationError: It is a folder, and ``datasets`` is not installed.
    """

    path: str
    out: str

    def __post_init__(self) -> None:
        """Check the ending, and what it needs, before a large cache is read."""
        suffix = Path(self.out).suffix
        # Letters only: a folder's name may end in a version.
        if suffix[1:].isalpha() and suffix not in (".parquet", ".jsonl", ".json"):
            raise CacheError(
                f"{self.out}: tables are written as .parquet or .jsonl, or as a folder, whose name has no ending"
            )
        if suffix not in (".parquet", ".jsonl", ".json"):
            require_modules("hub", "datasets", what=f"{self.out} is a folder, not a .parquet or .jsonl file")
        require_place(self.out, "--out", is_folder=not suffix[1:].isalpha())


@dataclass
class ImportSettings:
    """Arguments of ``cache import``.

    Attributes:
        path: A ``.jsonl`` or ``.parquet`` file, or a Hugging Face name. A row belongs to the training question with its
            ``uid``, or with its text.
        out: The cache file.
        response_column: Column of the response's text.
        question_column: Column of the question's text; ``problem``, ``question`` or ``prompt`` if not given.
        only_correct: Whether to leave out responses that the verifier does not accept.
    """

    path: str
    out: str = "cache.parquet"
    response_column: str = "response"
    question_column: str | None = None
    only_correct: bool = False

    def __post_init__(self) -> None:
        """Check the place of the cache file before rows are read."""
        require_place(self.out, "--out")


def run_export(arguments: list[str]) -> None:
    """Write a cache as a table."""
    cli = ToolCLI("cache export", CACHE_COMMANDS["export"], RPOModule, ExportSettings, arguments)
    export(cli.added, cli.model, cli.datamodule)


def run_import(arguments: list[str]) -> None:
    """Make a cache of a table."""
    cli = ToolCLI("cache import", CACHE_COMMANDS["import"], RPOModule, ImportSettings, arguments)
    refresh = EpsilonGreedyRefresh() if cli.cache_settings is None else cli.cache_settings.refresh
    import_(cli.added, cli.model, cli.datamodule, refresh)


def export(settings: ExportSettings, module: PolicyModule, data: RPODataModule) -> None:
    """Write a cache as a table with the texts of its questions and responses.

    Raises:
        CacheError: The cache holds no responses.
    """
    cache = read_cache(settings.path, tokenizer_fingerprint(module.tokenizer), module.vocabulary_size)
    responses = sum(len(entry.anchors) for entry in cache)
    if not responses:
        raise CacheError(f"{settings.path}: holds no responses, so there is nothing to export")
    prompts = data.read("train", "", module.tokenizer, module.grader.verifier, module.grader.rewards)
    write_rows(exported_rows(cache, module.tokenizer, {p.uid: p for p in prompts}), settings.out)
    print(f"{responses} responses written to {settings.out}")


def import_(settings: ImportSettings, module: PolicyModule, data: RPODataModule, refresh: RefreshRule) -> None:
    """Make a cache of the responses in a table.

    Args:
        settings: The command's arguments.
        module: Has the tokenizer, and the verifier and rewards that grade the responses.
        data: Has the training questions.
        refresh: Says how many responses to a question are cached.

    Raises:
        CacheError: No row is about a training question, or no response may be cached.
    """
    cache = ExperienceCache(tokenizer_fingerprint(module.tokenizer), module.vocabulary_size)
    prompts = data.read("train", "", module.tokenizer, module.grader.verifier, module.grader.rewards)
    source = as_source(settings.path, split="train")
    columns = [settings.question_column] if settings.question_column else list(QUESTION_COLUMNS)
    try:
        report = import_responses(
            cache, prompts, tqdm(source.rows(), desc="reading", unit="row", disable=None),
            (columns, settings.response_column), module.tokenizer, module.grader,
            module.max_response_tokens, repr(source), refresh, settings.only_correct,
        )  # fmt: skip
    finally:
        module.grader.pool.close()
    if not report.matched:
        overlong = f"; {report.overlong} are, but over model.max_response_tokens" if report.overlong else ""
        raise CacheError(
            f"{source!r}: none of its rows is about one of the {len(prompts)} training questions{overlong}: rows need "
            "the question's uid or its exact text"
        )
    if not report.responses:
        raise CacheError(
            f"{source!r}: none of its {report.matched} responses is right: check that model.verifier reads their "
            "answers, or drop --only_correct"
        )
    write_cache(cache, settings.out)
    print(
        f"{report.matched} rows used, {report.right} of them right; left out: {report.unmatched} about no training "
        f"question, {report.overlong} over model.max_response_tokens={module.max_response_tokens}"
    )
    print(summary(cache, settings.out))
