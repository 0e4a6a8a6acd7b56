"""Callbacks: experience cache, weight sync, completions, export, predictions, evaluation results, run summary."""

from rpo_lightning.callbacks.completions import CompletionsCallback
from rpo_lightning.callbacks.evaluation_results import EvaluationResultsCallback
from rpo_lightning.callbacks.experience_cache import ExperienceCacheCallback
from rpo_lightning.callbacks.export import HuggingFaceExportCallback
from rpo_lightning.callbacks.predictions import PredictionsCallback
from rpo_lightning.callbacks.run_summary import RunSummaryCallback
from rpo_lightning.callbacks.weight_sync import WeightSyncCallback

__all__ = [
    "CompletionsCallback",
    "EvaluationResultsCallback",
    "ExperienceCacheCallback",
    "HuggingFaceExportCallback",
    "PredictionsCallback",
    "RunSummaryCallback",
    "WeightSyncCallback",
]
