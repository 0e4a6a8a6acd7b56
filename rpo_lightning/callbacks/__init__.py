"""Callbacks: the experience cache, the engine's weights, the files of a run, its summary, and its progress bar."""

from rpo_lightning.callbacks.completions import CompletionsCallback
from rpo_lightning.callbacks.evaluation_results import EvaluationResultsCallback
from rpo_lightning.callbacks.experience_cache import ExperienceCacheCallback
from rpo_lightning.callbacks.export import HuggingFaceExportCallback
from rpo_lightning.callbacks.lone_exception import LoneExceptionCallback
from rpo_lightning.callbacks.predictions import PredictionsCallback
from rpo_lightning.callbacks.progress_lines import ProgressLinesCallback
from rpo_lightning.callbacks.question_outcomes import QuestionOutcomesCallback
from rpo_lightning.callbacks.run_progress import RunProgressBar
from rpo_lightning.callbacks.run_summary import RunSummaryCallback
from rpo_lightning.callbacks.stop_signals import StopSignalsCallback
from rpo_lightning.callbacks.weight_sync import WeightSyncCallback
from rpo_lightning.callbacks.whole_logs import WholeLogsCallback

__all__ = [
    "CompletionsCallback",
    "EvaluationResultsCallback",
    "ExperienceCacheCallback",
    "HuggingFaceExportCallback",
    "LoneExceptionCallback",
    "PredictionsCallback",
    "ProgressLinesCallback",
    "QuestionOutcomesCallback",
    "RunProgressBar",
    "RunSummaryCallback",
    "StopSignalsCallback",
    "WeightSyncCallback",
    "WholeLogsCallback",
]
