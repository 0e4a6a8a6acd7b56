"""Evaluation of a policy: answers to questions, and metrics over them with confidence intervals."""

from rpo_lightning.evaluation.evaluation import Estimate, Evaluation
from rpo_lightning.evaluation.metrics import AverageAtK, MajorityAtK, PassAtK, QuestionMean, QuestionMetric

__all__ = ["AverageAtK", "Estimate", "Evaluation", "MajorityAtK", "PassAtK", "QuestionMean", "QuestionMetric"]
