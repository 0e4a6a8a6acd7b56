"""How good a policy is: metrics over questions, their intervals, results as files."""

from rpo_lightning.evaluation.evaluation import Estimate, Evaluation
from rpo_lightning.evaluation.metrics import AverageAtK, MajorityAtK, PassAtK, QuestionMean, QuestionMetric

__all__ = ["AverageAtK", "Estimate", "Evaluation", "MajorityAtK", "PassAtK", "QuestionMean", "QuestionMetric"]
