"""``rpo-lightning cache …``: build, export, import, show and count experience caches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from tqdm.auto import tqdm

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, FractionOfShortestCut
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.prefixes import drawn_prefix, initial_response
from rpo_lightning.cli.cache.exchange import exported_rows, import_responses, write_rows
from rpo_lightning.cli.parser import PlainArgumentParser
from rpo_lightning.cli.tool_cli import ToolCLI
from rpo_lightning.core.errors import CacheError, ConfigurationError
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.data.prompts import QUESTION_COLUMNS
from rpo_lightning.data.sources import as_source
from rpo_lightning.evaluation.module import PolicyModule
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import decode, load_tokenizer, tokenizer_fingerprint

# How many tokens make an opening.
OPENING_TOKENS = 16


class BuildCacheCallback(Callback):
    """Makes a cache of the best answers that ``predict`` samples to the training questions.

    ``cache.initial_samples``, ``cache.initial_sampling`` and ``cache.keep_unfinished`` say how, as they do for eager
    initialisation; without ``cache`` in the config ``model.evaluation``.

    Args:
        out: The cache file.
        keep_unfinished: Whether answers that ran out of budget may be cached.
    """

    def __init__(self, out: str = "cache.parquet", keep_unfinished: bool = False) -> None:
        self.out = out
        self.keep_unfinished = keep_unfinished
        self._found: list[dict[str, Any]] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: RPOModule, *_: Any) -> None:
        """Choose the best answers of a batch."""
        for group in pl_module.answered:
            uid = group.request.prompt.uid
            self._found.append({"uid": uid, "response": initial_response(group, self.keep_unfinished)})

    def on_predict_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Save the cache."""
        found = gather_rows(self._found, ("uid",))
        if not trainer.is_global_zero:
            return
        cache = ExperienceCache(tokenizer_fingerprint(pl_module.tokenizer))
        for row in found:
            cache.entry(row["uid"])
            if row["response"] is not None:
                cache.remember(row["uid"], row["response"])
        if not any(row["response"] is not None for row in found):
            raise CacheError(
                f"none of {len(found)} questions has an answer that ended within model.max_response_tokens="
                f"{pl_module.max_response_tokens}: raise it, or give --keep_unfinished true"
            )
        write_cache(cache, self.out)
        print(_summary(cache, self.out))


@dataclass
class ExportSettings:
    """Write a cache as a table with text.

    Attributes:
        path: The cache file.
        out: A ``.parquet`` or ``.jsonl`` file, or a folder for ``datasets.load_from_disk``.

    Raises:
        CacheError: ``out`` names a file of another kind.
    """

    path: str
    out: str

    def __post_init__(self) -> None:
        """Refuse before a large cache is read."""
        suffix = Path(self.out).suffix
        # Letters only: a folder's name may end in a version.
        if suffix[1:].isalpha() and suffix not in (".parquet", ".jsonl", ".json"):
            raise CacheError(
                f"{self.out}: tables are written as .parquet or .jsonl, or as a folder, whose name has no ending"
            )


@dataclass
class ImportSettings:
    """Make a cache of responses from elsewhere: an exported cache, or questions with solutions.

    Attributes:
        path: ``.jsonl``, ``.parquet``, or a Hugging Face name. Rows are matched with the training questions by their
            ``uid``, or else by the question's text.
        out: The cache file.
        response_column: Column of the response's text.
        question_column: Column of the question; ``problem``, ``question`` or ``prompt`` if not given.
    """

    path: str
    out: str = "cache.parquet"
    response_column: str = "response"
    question_column: str | None = None


def export(settings: ExportSettings, module: PolicyModule, data: RPODataModule) -> None:
    """Write a cache with the texts of its questions and responses."""
    cache = ExperienceCache(tokenizer_fingerprint(module.tokenizer))
    cache = read_cache(settings.path, cache.tokenizer_fingerprint)
    prompts = data.read("train", "", module.tokenizer, module.grader.verifier)
    rows = list(exported_rows(cache, module.tokenizer, {p.uid: p for p in prompts}))
    if not rows:
        raise CacheError(f"{settings.path}: holds no responses, so there is nothing to export")
    write_rows(rows, settings.out)
    print(f"{len(rows)} responses written to {settings.out}")


def import_(settings: ImportSettings, module: PolicyModule, data: RPODataModule) -> None:
    """Make a cache of responses from elsewhere."""
    cache = ExperienceCache(tokenizer_fingerprint(module.tokenizer))
    prompts = data.read("train", "", module.tokenizer, module.grader.verifier)
    source = as_source(settings.path, split="train")
    columns = [settings.question_column] if settings.question_column else list(QUESTION_COLUMNS)
    try:
        report = import_responses(
            cache, prompts, tqdm(source.rows(), desc="reading", unit="row", disable=None),
            (columns, settings.response_column), module.tokenizer, module.grader,
            module.max_response_tokens, repr(source),
        )  # fmt: skip
    finally:
        module.grader.pool.close()
    if not report.responses:
        raise CacheError(f"{source!r}: none of its rows is about one of the {len(prompts)} training questions")
    write_cache(cache, settings.out)
    print(
        f"{report.matched} rows used; left out: {report.unmatched} about no training question, {report.overlong} over "
        f"model.max_response_tokens={module.max_response_tokens}"
    )
    print(_summary(cache, settings.out))


def stats(path: str, tokenizer: str) -> None:
    """Print statistics of a cache.

    Args:
        path: The cache file.
        tokenizer: Folder or name of the policy whose tokenizer it was made with.
    """
    print(_summary(_load(path, tokenizer)[0], path))


def show(
    path: str,
    tokenizer: str,
    uid: str | None = None,
    entries: int = 3,
    cut: CutStrategy | None = None,
) -> None:
    """Print entries with the parts that a cut keeps and drops.

    Args:
        path: The cache file.
        tokenizer: Folder or name of the policy whose tokenizer it was made with.
        uid: The question; the first ones if not given.
        entries: How many.
        cut: The cut strategy, with the draws of a run of seed 0; the paper's ``FractionOfShortestCut`` if not given.
    """
    cache, loaded = _load(path, tokenizer)
    filled = [e for e in cache if e.response is not None]
    chosen = [e for e in filled if e.uid == uid] if uid else filled[:entries]
    if not chosen:
        raise CacheError(f"{path}: no response for question {uid!r}" if uid else f"{path}: holds no responses")
    for entry in chosen:
        print(_shown(entry, loaded, cut or FractionOfShortestCut()))


def _load(path: str, tokenizer: str) -> tuple[ExperienceCache, Any]:
    loaded = load_tokenizer(tokenizer)
    cache = ExperienceCache(tokenizer_fingerprint(loaded))
    cache = read_cache(path, cache.tokenizer_fingerprint)
    return cache, loaded


def _shown(entry: CacheEntry, tokenizer: Any, cut: CutStrategy) -> str:
    response = entry.response
    assert response is not None
    kept = drawn_prefix(cut, entry, response)
    ids = response.token_ids.tolist()
    verdict = f"{'right' if response.correct else 'wrong'}, reward {response.reward:g}"
    ended = "finished" if response.finished else "cut off by its budget"
    origins = ", ".join(f"{count} at {_made_at(step)}" for step, count in response.spans)
    return "\n".join(
        [
            f"question {entry.uid}: {verdict}, {ended}, {entry.visits} visits; {len(ids)} tokens: {origins}",
            f"  kept ({kept}):  {decode(tokenizer, ids[:kept])}",
            f"  cut ({len(ids) - kept}):   {decode(tokenizer, ids[kept:])}",
            "",
        ]
    )


def _made_at(step: int) -> str:
    return "elsewhere" if step < 0 else f"update {step}"


def _summary(cache: ExperienceCache, where: str) -> str:
    responses = [e.response for e in cache if e.response is not None]
    lines = [f"{where}: {len(cache)} questions, {len(responses)} with a response"]
    if responses:
        lines += _statistics(responses, [e.visits for e in cache])
    return "\n".join(lines)


def _statistics(responses: list[CachedResponse], visits: list[int]) -> list[str]:
    lengths = np.array([len(r) for r in responses])
    newest = max(r.step for r in responses)
    tokens = Counter[str]()
    for response in responses:
        for step, count in response.spans:
            tokens["elsewhere" if step < 0 else "start" if step == 0 else "updates"] += count
    total = max(sum(tokens.values()), 1)
    origin = ", ".join(
        f"{tokens[key] / total:.1%} {text}"
        for key, text in (
            ("start", "by the starting policy"),
            ("updates", "by later ones"),
            ("elsewhere", "elsewhere"),
        )
    )
    openings = len({r.token_ids[:OPENING_TOKENS].tobytes() for r in responses})
    quantiles = ", ".join(f"{q:.0f}" for q in np.percentile(lengths, [0, 25, 50, 75, 100]))
    age = np.array([newest - r.step for r in responses])
    return [
        f"right                 {sum(r.correct for r in responses) / len(responses):.1%}",
        f"finished              {sum(r.finished for r in responses) / len(responses):.1%}",
        f"tokens                {lengths.mean():.1f} on average; quartiles {quantiles}",
        f"age                   {age.mean():.1f} updates on average, {age.max()} at most, up to update {newest}",
        f"tokens generated      {origin}",
        f"distinct openings     {openings} of {len(responses)} (first {OPENING_TOKENS} tokens)",
        f"visits                {np.mean(visits):.1f} a question on average",
    ]


_CACHE_HELP = """usage: rpo-lightning cache COMMAND ...

  build    sample the policy's answers to the training questions (arguments of fit)
  import   make a cache of responses from elsewhere (arguments of fit)
  export   write a cache as a table with text (arguments of fit)
  show     print entries with what a cut keeps of them
  stats    print statistics

COMMAND --help lists its arguments."""


def cache(arguments: list[str]) -> None:
    """Build, look at, export and import experience caches."""
    if arguments[:1] == ["build"]:
        cli = ToolCLI("cache build", RPOModule, BuildCacheCallback, arguments[1:])
        settings = cli.config_init.get("cache")
        if settings is not None:
            sampling = settings.initial_sampling or cli.model.sampling
            cli.model.evaluation = EvaluationSettings(sampling, settings.initial_samples)
            cli.added.keep_unfinished = cli.added.keep_unfinished or settings.keep_unfinished
        cli.predict_on("train")
    elif arguments[:1] == ["export"]:
        cli = ToolCLI("cache export", RPOModule, ExportSettings, arguments[1:])
        export(cli.added, cli.model, cli.datamodule)
    elif arguments[:1] == ["import"]:
        cli = ToolCLI("cache import", RPOModule, ImportSettings, arguments[1:])
        import_(cli.added, cli.model, cli.datamodule)
    elif arguments[:1] in (["show"], ["stats"]):
        auto_cli(
            {"show": show, "stats": stats},
            as_positional=False,
            args=arguments,
            prog="rpo-lightning cache",
            parser_class=PlainArgumentParser,
        )
    elif arguments[:1] in (["-h"], ["--help"]):
        print(_CACHE_HELP)
    else:
        raise ConfigurationError(f"cache {' '.join(arguments[:1])}: no such command\n{_CACHE_HELP}")
