"""The experience cache and RPO's rules for it: cuts, suffix budgets, refresh. Nothing here imports Lightning."""

from rpo_lightning.cache.budgets import CutPlusSlackBudget, FullBudget, SuffixBudget
from rpo_lightning.cache.cache import CachedResponse, CacheEntry, ExperienceCache
from rpo_lightning.cache.cuts import AnchoredCut, CutStrategy, FractionOfShortestCut, GroupOutcome, UniformCut
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.refresh import AnchorsRefresh, CorrectMemberRefresh, EpsilonGreedyRefresh, RefreshRule
from rpo_lightning.cache.success_cuts import BisectionCut, TargetSuccessCut

__all__ = [
    "AnchoredCut",
    "AnchorsRefresh",
    "BisectionCut",
    "CacheEntry",
    "CachedResponse",
    "CorrectMemberRefresh",
    "CutPlusSlackBudget",
    "CutStrategy",
    "EpsilonGreedyRefresh",
    "ExperienceCache",
    "FractionOfShortestCut",
    "FullBudget",
    "GroupOutcome",
    "RefreshRule",
    "SuffixBudget",
    "TargetSuccessCut",
    "UniformCut",
    "read_cache",
    "write_cache",
]
