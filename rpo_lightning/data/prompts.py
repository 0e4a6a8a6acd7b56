"""From rows to tokenised prompts: columns, gold answers, chat template, uids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.errors import DataError
from rpo_lightning.core.hashing import short_name
from rpo_lightning.core.rows import nested
from rpo_lightning.core.types import Prompt
from rpo_lightning.data.conversations import last_user_text, read_messages
from rpo_lightning.data.gold_answers import TOLERANCE_COLUMN, gold_answer, is_empty
from rpo_lightning.data.prompt_format import Message, PromptFormat
from rpo_lightning.data.rows import plain_row
from rpo_lightning.data.sources import DataSource
from rpo_lightning.rewards.base import Reward, Verifier

QUESTION_COLUMNS = ("problem", "question", "prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "reward_model.ground_truth")


@dataclass
class LoadReport:
    """What happened while a source was read.

    Attributes:
        kept: Prompts that are used.
        overlong: Prompts dropped because they exceed the limit.
        duplicates: Rows dropped because their uid had been seen.
        unusable: One message for each row dropped because its question or gold answer is missing or cannot be used.
        only_text: Gold answers among the kept that only their own text can match.
        unknown: Questions among the kept with characters that the tokenizer does not know.
        left_out: Columns that rewards do not see because they are not JSON, with what they hold.
    """

    kept: int = 0
    overlong: int = 0
    duplicates: int = 0
    unusable: list[str] = field(default_factory=list)
    only_text: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Rows that are not used, for whatever reason."""
        return len(self.unusable) + self.overlong + self.duplicates

    def messages(self) -> list[str]:
        """Everything that was left out."""
        counted = [f"{self.overlong} prompts over data.max_prompt_tokens"] if self.overlong else []
        counted += [f"{self.duplicates} repeated questions"] if self.duplicates else []
        return [*self.unusable, *counted, *self.unknown_message(), *self.only_text_message()]

    def unknown_message(self) -> list[str]:
        """How many questions the policy cannot read as they are, if there are any."""
        if not self.unknown:
            return []
        shown = ", ".join(repr(text[:40]) for text in self.unknown[:3])
        return [f"{len(self.unknown)} questions have characters that the tokenizer does not know, such as {shown}"]

    def only_text_message(self) -> list[str]:
        """How many gold answers only their own text can match, if there are any."""
        if not self.only_text:
            return []
        shown = ", ".join(repr(answer[:40]) for answer in self.only_text[:3])
        return [f"{len(self.only_text)} gold answers can be matched by their own text only, such as {shown}"]

    def left_out_message(self) -> list[str]:
        """Which columns rewards do not see, if there are any."""
        shown = ", ".join(f"{column!r} ({what})" for column, what in self.left_out.items())
        return [f"rewards do not see values that are not JSON: {shown}"] if shown else []


class PromptBuilder:
    """Builds prompts from rows.

    Args:
        tokenizer: The policy's tokenizer.
        verifier: Says which rows and gold answers it can judge.
        max_prompt_tokens: Longer prompts are dropped.
        question_column: Column of the question; found by its usual names if not given.
        answer_column: Column of the gold answer; likewise.
        uid_column: Column of a stable identifier; a hash of question and answer if not given.
        system_prompt: Opening system message, for chat models; conversations with one of their own keep that.
        use_chat_template: Whether to apply the tokenizer's chat template; by default if it has one.
        continue_final_message: Whether a conversation that ends with a message of the assistant is continued; otherwise
            its row is dropped.
        chat_template_kwargs: Variables for the chat template.
        few_shot: Solved examples, as messages before the question.
        rewards: Say which rows they cannot be computed for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        max_prompt_tokens: int,
        question_column: str | None = None,
        answer_column: str | None = None,
        uid_column: str | None = None,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        few_shot: Sequence[Message] = (),
        rewards: Sequence[Reward] = (),
    ) -> None:
        self.verifier = verifier
        self.rewards = rewards
        self.max_prompt_tokens = max_prompt_tokens
        self.question_column = question_column
        self.answer_column = answer_column
        self.uid_column = uid_column
        self.continue_final_message = continue_final_message
        self.format = PromptFormat(tokenizer, system_prompt, use_chat_template, chat_template_kwargs, few_shot)

    def build(self, source: DataSource) -> tuple[list[Prompt], LoadReport]:
        """Read a source to its end.

        Raises:
            DataError: Unknown column, a row that the verifier or a reward cannot judge, a conversation without a chat
                template, text that is no Unicode, or nothing left to use.
        """
        report = LoadReport()
        prompts: dict[str, Prompt] = {}
        for number, row in enumerate(source.rows(), start=1):
            where = f"{source!r}, row {number}"
            question = self._value(row, self.question_column, QUESTION_COLUMNS, "question", where)
            value = self._value(row, self.answer_column, ANSWER_COLUMNS, "answer", where)
            if is_empty(question) or is_empty(value):
                what = "question" if is_empty(question) else "gold answer"
                report.unusable.append(f"{where}: dropped, its {what} is empty")
                continue
            try:
                messages = self._messages(question)
                answer = gold_answer(value, row.get(TOLERANCE_COLUMN) if "final_answer" in row else None)
            except ValueError as error:
                report.unusable.append(f"{where}: dropped, {error}")
                continue
            asked = _asked(messages, answer, where)
            plain = self._plain(row, report, where)
            verifier = self.verifier.of_row(plain)
            problem = verifier.gold_problem(answer)
            if problem is not None:
                report.unusable.append(f"{where}: dropped, the gold answer {answer[:60]!r} cannot be used: {problem}")
                continue
            text = last_user_text(messages)
            token_ids, opening = self.format.prompt(messages, text, where)
            if len(token_ids) > self.max_prompt_tokens:
                report.overlong += 1
                continue
            uid = self._uid(row, asked, answer, where)
            if uid in prompts:
                report.duplicates += 1
                continue
            if verifier.is_only_text(answer):
                report.only_text.append(answer)
            if self.format.unknown_id in token_ids:
                report.unknown.append(text)
            prompts[uid] = Prompt(uid, text, tuple(token_ids), answer, opening, plain)
        report.kept = len(prompts)
        if not prompts and not report.dropped:
            raise DataError(f"{source!r}: no usable question in it: it has no rows")
        if not prompts:
            raise DataError(
                f"{source!r}: no usable question in it ({report.overlong} over data.max_prompt_tokens="
                f"{self.max_prompt_tokens}, {len(report.unusable)} without a usable question or gold answer)"
                + "".join(f"; {message}" for message in report.unusable[:1])
            )
        return list(prompts.values()), report

    def _plain(self, row: Mapping[str, Any], report: LoadReport, where: str) -> dict[str, Any]:
        """The row as rewards see it, which verifier and rewards can judge."""
        plain, others = plain_row(row)
        report.left_out.update(others)
        judges: list[Verifier | Reward] = [self.verifier, *self.rewards]
        for judge in judges:
            problem = judge.row_problem(plain)
            if problem is not None:
                held = "".join(f"; {column!r} holds {what}, which is not JSON" for column, what in others.items())
                raise DataError(f"{where}: {problem}{held}")
        return plain

    def _value(self, row: Mapping[str, Any], column: str | None, usual: Iterable[str], what: str, where: str) -> Any:
        names = [column] if column else list(usual)
        for name in names:
            is_there, value = nested(row, name)
            if is_there:
                return value
        raise DataError(
            f"{where}: no column {' or '.join(repr(n) for n in names)} for the {what}; it has "
            f"{', '.join(sorted(row)) or 'none'}: set data.{what}_column"
        )

    def _messages(self, question: Any) -> list[dict[str, Any]]:
        """The messages of a question.

        Raises:
            ValueError: They cannot be used.
        """
        messages = read_messages(question)
        if is_empty(messages[-1]["content"]) and messages[-1]["role"] != "assistant":
            raise ValueError("the last message of its conversation is empty")
        if messages[-1]["role"] == "assistant" and not self.continue_final_message:
            raise ValueError(
                "its conversation ends with a message of the assistant: leave that out, or set "
                "data.continue_final_message=true if the policy is to continue it"
            )
        return messages

    def _uid(self, row: Mapping[str, Any], asked: str, answer: str, where: str) -> str:
        if self.uid_column is None:
            return short_name(f"{asked}\0{answer}")
        _, value = nested(row, self.uid_column)
        if value is None:
            raise DataError(f"{where}: no value in the uid column {self.uid_column!r}")
        return str(value)


def _asked(messages: list[Any], answer: str, where: str) -> str:
    """What makes a question: its text, or all of a conversation, since several may end alike.

    Raises:
        DataError: It, or the answer, is no text that could be encoded.
    """
    whole = len(messages) > 1
    asked = json.dumps(messages, ensure_ascii=False, sort_keys=True) if whole else str(messages[0]["content"])
    try:
        (asked + answer).encode()
    except UnicodeEncodeError as error:
        message = f"{where}: a lone surrogate, which is half a character, in question or gold answer: remove it"
        raise DataError(message) from error
    return asked
