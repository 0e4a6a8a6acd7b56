"""``rpo-lightning cache show`` and ``cache stats``: a cache as text.

They need its file and the policy's tokenizer only.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from jsonargparse import auto_cli

from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import CutStrategy, FractionOfShortestCut, require_usable_notes
from rpo_lightning.cache.draws import drawn_prefix
from rpo_lightning.cache.parquet import read_cache
from rpo_lightning.cli.parser import PlainArgumentParser
from rpo_lightning.core.errors import CacheError
from rpo_lightning.policy.tokenizer import decode, load_tokenizer, tokenizer_fingerprint

# Responses whose first tokens are equal count as one opening.
OPENING_TOKENS = 16


def run(arguments: list[str]) -> None:
    """Run ``show`` or ``stats``, whichever the first argument is."""
    auto_cli(
        {"show": show, "stats": stats},
        as_positional=False,
        args=arguments,
        prog="rpo-lightning cache",
        parser_class=PlainArgumentParser,
    )


def stats(path: str, tokenizer: str, trust_remote_code: bool = False) -> None:
    """Print statistics of a cache.

    Args:
        path: The cache file.
        tokenizer: Folder or name of the policy whose tokenizer it was made with.
        trust_remote_code: Whether Python code that comes with the tokenizer may be executed.
    """
    print(summary(_load(path, tokenizer, trust_remote_code)[0], path))


def show(
    path: str,
    tokenizer: str,
    uid: str | None = None,
    entries: int = 3,
    cut: CutStrategy | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print entries of a cache with what a cut keeps and drops.

    Args:
        path: The cache file.
        tokenizer: Folder or name of the policy whose tokenizer it was made with.
        uid: Print the entry of this question only.
        entries: How many entries to print, if no ``uid`` is given.
        cut: The cut strategy, which draws as in a run with seed 0; the paper's ``FractionOfShortestCut`` if not given.
        trust_remote_code: Whether Python code that comes with the tokenizer may be executed.

    Raises:
        CacheError: There is no such entry.
    """
    if entries < 1:
        raise CacheError(f"--entries must be at least 1, got {entries}")
    cache, loaded = _load(path, tokenizer, trust_remote_code)
    cut = cut or FractionOfShortestCut()
    require_usable_notes(cut, cache, path)
    filled = [e for e in cache if e.has_anchor]
    chosen = [e for e in filled if e.uid == uid] if uid else filled[:entries]
    if not chosen:
        raise CacheError(
            f"{path}: no response for question {uid!r}; --entries lists some" if uid else f"{path}: holds no responses"
        )
    for entry in chosen:
        print(_shown(entry, loaded, cut))


def _load(path: str, tokenizer: str, trust_remote_code: bool) -> tuple[ExperienceCache, Any]:
    loaded = load_tokenizer(tokenizer, trust_remote_code)
    return read_cache(path, tokenizer_fingerprint(loaded)), loaded


def _shown(entry: CacheEntry, tokenizer: Any, cut: CutStrategy) -> str:
    """All responses of an entry; the one that the cut chooses is cut, the others are kept out of the next visit."""
    chosen, prefix_length = drawn_prefix(cut, entry)
    lines = []
    for response in entry.anchors:
        # Views of one row share its memory.
        is_cut = chosen is not None and np.shares_memory(response.token_ids, chosen.token_ids)
        lines += _shown_response(entry, response, prefix_length if is_cut else 0, tokenizer)
    return "\n".join([*lines, ""])


def _shown_response(entry: CacheEntry, response: CachedResponse, kept: int, tokenizer: Any) -> list[str]:
    ids = response.token_ids.tolist()
    verdict = f"{'right' if response.correct else 'wrong'}, reward {response.reward:g}"
    ended = "finished" if response.finished else "cut off by its budget"
    origins = ", ".join(f"{count} at {_made_at(step)}" for step, count in response.spans)
    return [
        f"question {entry.uid}: {verdict}, {ended}, {entry.visits} visits; {len(ids)} tokens: {origins}",
        f"  prefix ({kept}):   {decode(tokenizer, ids[:kept])}",
        f"  dropped ({len(ids) - kept}):  {decode(tokenizer, ids[kept:])}",
    ]


def _made_at(step: int) -> str:
    return "elsewhere" if step < 0 else f"update {step}"


def summary(cache: ExperienceCache, where: str) -> str:
    """Statistics of a cache as lines of text.

    Args:
        cache: The cache.
        where: Names it in the first line.
    """
    responses = [response for entry in cache for response in entry.anchors]
    lines = [f"{where}: {len(cache)} questions, {sum(entry.has_anchor for entry in cache)} with a response"]
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
        f"responses             {len(responses)}",
        f"right                 {sum(r.correct for r in responses) / len(responses):.1%}",
        f"finished              {sum(r.finished for r in responses) / len(responses):.1%}",
        f"tokens                {lengths.mean():.1f} on average; quartiles {quantiles}",
        f"age                   {age.mean():.1f} updates on average, {age.max()} at most, up to update {newest}",
        f"tokens generated      {origin}",
        f"distinct openings     {openings} of {len(responses)} (first {OPENING_TOKENS} tokens)",
        f"visits                {np.mean(visits):.1f} a question on average",
    ]
