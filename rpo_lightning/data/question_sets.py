"""The sets of questions of a run: each is read once, for a tokenizer and a verifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, DataError
from rpo_lightning.core.types import Prompt
from rpo_lightning.data.prompt_format import few_shot_messages, read_chat_template
from rpo_lightning.data.prompts import LoadReport, PromptBuilder
from rpo_lightning.data.sources import DataSource, Row, as_source
from rpo_lightning.rewards.base import Reward, Verifier

log = logging.getLogger(__name__)

_MAX_MESSAGES = 5

# What users write for a set of questions. ``Path`` comes last, since the command line takes anything for one.
Questions = str | DataSource | Sequence[Row] | Path
# Solved examples. Text comes first, so that the command line leaves "7" as it is.
Examples = str | DataSource | Sequence[Mapping[str, str | int | float]] | Path
# Several sets by name, for evaluation.
NamedQuestions = str | DataSource | Sequence[Row] | dict[str, str | DataSource | Path] | Path


@dataclass(frozen=True)
class PromptSettings:
    """How rows become prompts. ``RPODataModule`` describes the fields."""

    max_prompt_tokens: int = 1024
    question_column: str | None = None
    answer_column: str | None = None
    uid_column: str | None = None
    system_prompt: str | None = None
    use_chat_template: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    few_shot: Examples = ""
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise ConfigurationError(f"data.max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}")
        if self.chat_template is not None and self.use_chat_template is False:
            raise ConfigurationError("data.chat_template is not used with data.use_chat_template=false: drop one")

    def builder(
        self, tokenizer: PreTrainedTokenizerBase, verifier: Verifier, rewards: Sequence[Reward]
    ) -> PromptBuilder:
        """What builds prompts for a tokenizer, a verifier and rewards."""
        return PromptBuilder(
            tokenizer=tokenizer,
            verifier=verifier,
            max_prompt_tokens=self.max_prompt_tokens,
            question_column=self.question_column,
            answer_column=self.answer_column,
            uid_column=self.uid_column,
            system_prompt=self.system_prompt,
            use_chat_template=self.use_chat_template,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            few_shot=few_shot_messages(as_source(self.few_shot, "train")) if self.few_shot else (),
            rewards=rewards,
        )


class QuestionSets:
    """Reads the sets of ``train``, ``val``, ``test`` and ``predict``.

    Args:
        sources: What each split is read from; empty if it is not set.
        settings: How rows become prompts.

    Attributes:
        prompts: The prompts of the sets that have been read, by ``set_key``.
        reports: What was left out of them.
    """

    def __init__(self, sources: Mapping[str, NamedQuestions], settings: PromptSettings) -> None:
        self.sources = dict(sources)
        self.settings = settings
        self.prompts: dict[str, list[Prompt]] = {}
        self.reports: dict[str, LoadReport] = {}
        self._read_with: tuple[PreTrainedTokenizerBase, Verifier] | None = None

    def of_split(self, split: str) -> dict[str, Questions]:
        """The sets of a split by name; a single one has an empty name."""
        data = self.sources[split]
        if isinstance(data, dict):
            return dict(data)
        return {"": data} if data else {}

    def loaded(self, split: str, name: str = "") -> list[Prompt]:
        """The prompts of a set that has been read.

        Raises:
            DataError: It is not given.
        """
        key = set_key(split, name)
        if key not in self.prompts:
            raise DataError(f"data.{key} is not set: give it a file, a data set name or a data source")
        return self.prompts[key]

    def read(
        self,
        split: str,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        rewards: Sequence[Reward] = (),
    ) -> list[Prompt]:
        """See ``RPODataModule.read``."""
        if self._read_with is None or self._read_with[0] is not tokenizer or self._read_with[1] is not verifier:
            self.prompts, self.reports, self._read_with = {}, {}, (tokenizer, verifier)
            if self.settings.chat_template is not None:
                tokenizer.chat_template = read_chat_template(self.settings.chat_template)
        key, sets = set_key(split, name), self.of_split(split)
        if key in self.prompts or name not in sets:
            return self.loaded(split, name)
        source = as_source(sets[name], hub_split(split))
        self.prompts[key], report = self.settings.builder(tokenizer, verifier, rewards).build(source)
        self.reports[key] = report
        self._tell(source, report)
        return self.prompts[key]

    def _tell(self, source: DataSource, report: LoadReport) -> None:
        """Say what of a set is not used."""
        for message in report.unusable[:_MAX_MESSAGES]:
            log.warning(message)
        for message in report.unknown_message():
            log.warning(f"{source!r}: {message}")
        for message in (*report.only_text_message(), *report.left_out_message()):
            log.info(f"{source!r}: {message}")
        if report.dropped:
            log.warning(
                f"{source!r}: {report.kept} questions kept; dropped {report.overlong} over "
                f"{self.settings.max_prompt_tokens} prompt tokens, {len(report.unusable)} without a usable question or "
                f"gold answer, {report.duplicates} duplicates"
            )


def hub_split(split: str) -> str:
    """The split of a bare data set name that ours is read from."""
    return "train" if split == "train" else "test"


def set_key(split: str, name: str) -> str:
    """Key of a set of questions: its split, and its name if it has one."""
    return f"{split}/{name}" if name else split
