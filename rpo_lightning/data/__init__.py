"""From rows to prompts to rollout requests."""

from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.data.selection import InformativeSelection, QuestionSelection
from rpo_lightning.data.sources import DataSource
from rpo_lightning.data.word_problems import WordProblems

__all__ = [
    "ArithmeticChain",
    "DataSource",
    "InformativeSelection",
    "QuestionSelection",
    "RPODataModule",
    "WordProblems",
]
