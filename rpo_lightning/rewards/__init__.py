"""Verifiers, rewards, and the pool that grades them."""

from rpo_lightning.rewards.base import AnswerVerifier, Reward, Verifier
from rpo_lightning.rewards.by_column import VerifierByColumn
from rpo_lightning.rewards.functions import FunctionReward
from rpo_lightning.rewards.grader import Grader
from rpo_lightning.rewards.grading import GradedGroup, Grading
from rpo_lightning.rewards.length import (
    CosineLengthReward,
    KimiLengthReward,
    LengthAwareAccuracyReward,
    SoftOverlongPenalty,
)
from rpo_lightning.rewards.pool import GradingPool
from rpo_lightning.rewards.short_answers import ChoiceVerifier, TextVerifier
from rpo_lightning.rewards.terms import AccuracyReward, FormatReward, UniformRandomReward
from rpo_lightning.rewards.verifiers import ExactMatchVerifier, FunctionVerifier, MathVerifier

__all__ = [
    "AccuracyReward",
    "AnswerVerifier",
    "ChoiceVerifier",
    "CosineLengthReward",
    "ExactMatchVerifier",
    "FormatReward",
    "FunctionReward",
    "FunctionVerifier",
    "GradedGroup",
    "Grader",
    "Grading",
    "GradingPool",
    "KimiLengthReward",
    "LengthAwareAccuracyReward",
    "MathVerifier",
    "Reward",
    "SoftOverlongPenalty",
    "TextVerifier",
    "UniformRandomReward",
    "Verifier",
    "VerifierByColumn",
]
