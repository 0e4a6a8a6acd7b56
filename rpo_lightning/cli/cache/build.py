"""``rpo-lightning cache build``: a cache of the policy's own answers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.candidates import best_responses, fill
from rpo_lightning.cache.parquet import write_cache
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh, RefreshRule
from rpo_lightning.cli.cache.show import summary
from rpo_lightning.cli.commands import CACHE_COMMANDS
from rpo_lightning.cli.tool_cli import ToolCLI
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.files import require_place
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.evaluation.settings import EvaluationSettings
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint


def build(arguments: list[str]) -> None:
    """Sample answers to the training questions and cache the best ones."""
    cli = ToolCLI("cache build", CACHE_COMMANDS["build"], RPOModule, BuildCacheCallback, arguments)
    settings = cli.cache_settings
    if settings is not None:
        sampling = settings.initial_sampling or cli.model.sampling
        cli.model.evaluation = EvaluationSettings(sampling, settings.initial_samples)
        cli.added.keep_unfinished = cli.added.keep_unfinished or settings.keep_unfinished
        cli.added.refresh = settings.refresh
    cli.predict_on("train")


class BuildCacheCallback(Callback):
    """Makes a cache of the best answers that ``predict`` samples to the training questions.

    ``cache.initial_samples``, ``cache.initial_sampling``, ``cache.keep_unfinished`` and ``cache.refresh`` say how, as
    for eager initialisation. Without ``cache`` in the config, ``model.evaluation`` does, and one answer is cached.

    Args:
        out: The cache file.
        keep_unfinished: Whether answers that ran out of budget may be cached.

    Attributes:
        refresh: Says how many answers to a question are cached.
    """

    def __init__(self, out: str = "cache.parquet", keep_unfinished: bool = False) -> None:
        require_place(out, "--out")
        self.out = out
        self.keep_unfinished = keep_unfinished
        self.refresh: RefreshRule = EpsilonGreedyRefresh()
        self._found: list[dict[str, Any]] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: RPOModule, *_: Any) -> None:
        """Choose the best answers of a batch."""
        for group in pl_module.answered:
            uid = group.request.prompt.uid
            responses = best_responses(group, self.refresh, self.keep_unfinished)
            self._found.append({"uid": uid, "responses": responses})

    def on_predict_end(self, trainer: Trainer, pl_module: RPOModule) -> None:
        """Write the cache file and print its statistics; a collective, rank 0 writes.

        Raises:
            CacheError: No answer may be cached.
        """
        found = gather_rows(self._found, ("uid",))
        if not trainer.is_global_zero:
            return
        cache = ExperienceCache(tokenizer_fingerprint(pl_module.tokenizer))
        for row in found:
            fill(cache.entry(row["uid"]), self.refresh, row["responses"])
        if not any(row["responses"] for row in found):
            raise CacheError(
                f"none of {len(found)} questions has an answer that ended within model.max_response_tokens="
                f"{pl_module.max_response_tokens}: raise it, or give --keep_unfinished true"
            )
        write_cache(cache, self.out)
        print(summary(cache, self.out))
