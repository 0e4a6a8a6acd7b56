"""From the messages of a question to the policy's prompt: system prompt, few-shot examples, chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.errors import DataError, one_line
from rpo_lightning.data.sources import DataSource

Message = Mapping[str, Any]

# What may end a prompt: thoughts that are opened, thoughts that are empty, or only their end (DeepSeek-V3.1).
_THOUGHTS_AT_THE_END = re.compile(r"(?:<think>\s*|(?:<think>\s*)?</think>\s*)\Z")
# Arguments of apply_chat_template that are the template's rather than the method's.
_OF_TEMPLATES = {"tools", "documents"}


class PromptFormat:
    """Makes prompts of messages.

    Args:
        tokenizer: The policy's tokenizer.
        system_prompt: Opening system message; conversations with one of their own keep that.
        use_chat_template: Whether to apply the tokenizer's chat template; by default if it has one.
        chat_template_kwargs: Variables for the template, such as ``enable_thinking``.
        few_shot: Solved examples, as messages between the system message and the question.

    Raises:
        DataError: A setting needs a chat template and there is none, or the template has no such variable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        few_shot: Sequence[Message] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.few_shot = list(few_shot)
        self.variables = dict(chat_template_kwargs or {})
        has_template = getattr(tokenizer, "chat_template", None) is not None
        self.use_chat_template = has_template if use_chat_template is None else use_chat_template
        if self.use_chat_template and not has_template:
            raise DataError("data.use_chat_template is true, but the tokenizer has no chat template")
        if not self.use_chat_template:
            named = {"system_prompt": system_prompt, "few_shot": few_shot, "chat_template_kwargs": chat_template_kwargs}
            for name in (name for name, value in named.items() if value):
                raise DataError(
                    f"data.{name} needs a chat template, and the tokenizer has none (or it is turned off): name a "
                    "Jinja file with data.chat_template"
                )
        # What the template has not been seen to write yet.
        self._unproved = {"the question", *(["data.system_prompt"] if system_prompt else [])}
        self._unproved |= {"data.few_shot"} if self.few_shot else set()
        self._require_variables()

    @property
    def unknown_id(self) -> int | None:
        """What stands for characters that the tokenizer does not know; ``None`` if it knows all."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        # Some name their end-of-text token for it, and never use it so.
        return None if unknown in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id) else unknown

    def _require_variables(self) -> None:
        """Check that the template reads what it is given: it would ignore a misspelt name."""
        ours = set(signature(self.tokenizer.apply_chat_template).parameters) - _OF_TEMPLATES - {"kwargs"} | {"messages"}
        for name in self.variables:
            if name in ours:
                raise DataError(
                    f"data.chat_template_kwargs.{name} is no variable of the chat template but set here: leave it out"
                )
            try:
                template = self.tokenizer.get_chat_template(tools=self.variables.get("tools"))
            except ValueError as error:
                raise _of_template(error) from error
            if not _reads(template, name):
                raise DataError(
                    f"data.chat_template_kwargs.{name}: the tokenizer's chat template does not read it, so it would "
                    "change nothing: leave it out, or name a variable of the template"
                )

    def prompt(self, messages: Sequence[Message], text: str, where: str) -> tuple[list[int], str]:
        """Make the prompt of a question.

        Args:
            messages: The question's messages.
            text: The question itself, which is the whole prompt without a chat template.
            where: Names the row in messages of errors.

        Returns:
            The prompt's token ids, and the part of the prompt that belongs to the response: thoughts that it opens or
            leaves empty, from the tag ``<think>`` on. Empty for most prompts.

        Raises:
            DataError: The template refuses the conversation or ends the prompt with the end-of-sequence token, or there
                is no template for a conversation.
        """
        eos = self.tokenizer.eos_token_id
        if not self.use_chat_template:
            if len(messages) > 1:
                raise DataError(
                    f"{where}: a conversation of {len(messages)} messages needs a chat template, and the tokenizer has "
                    "none (or it is turned off)"
                )
            token_ids = list(self.tokenizer(text)["input_ids"])
            while token_ids and token_ids[-1] == eos:
                token_ids.pop()  # some tokenizers end every text with it
            return token_ids, thoughts_at_the_end(text)
        rendered = self._rendered(self._completed(messages), where)
        self._require_effects(messages, rendered, where)
        token_ids = list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        if token_ids and token_ids[-1] == eos:
            raise DataError(
                f"{where}: the chat template ends the prompt with the end-of-sequence token "
                f"{self.tokenizer.eos_token!r}, after which there is nothing to say: give the tokenizer a template "
                "with a generation prompt"
            )
        if messages[-1]["role"] == "assistant":  # it is continued, and may be in the middle of a thought
            said = str(messages[-1]["content"])
            return token_ids, said[said.rindex("<think>") :] if "<think>" in said else ""
        return token_ids, thoughts_at_the_end(rendered)

    def _completed(self, messages: Sequence[Message], changed: str = "") -> list[Message]:
        """The messages with system prompt and examples; without the examples, or another prompt, if that is changed."""
        has_own = messages[0]["role"] == "system"
        opening: list[Message] = list(messages[:1]) if has_own else []
        if self.system_prompt and not has_own:
            more = " another" if changed == "data.system_prompt" else ""
            opening = [{"role": "system", "content": f"{self.system_prompt}{more}"}]
        return [*opening, *(self.few_shot if changed != "data.few_shot" else ()), *messages[has_own:]]

    def _require_effects(self, messages: Sequence[Message], rendered: str, where: str) -> None:
        """Check once that prompts are others with another system prompt or question, and without the examples.

        A template may write the same system prompt by itself: leaving it out would change nothing.

        Raises:
            DataError: The template leaves one of them out.
        """
        last = messages[-1]
        another = [*messages[:-1], {**last, "content": f"{last['content']} another"}]
        for name in sorted(self._unproved):
            if name == "data.system_prompt" and messages[0]["role"] == "system":
                continue  # the conversation keeps its own
            changed = self._completed(another if name == "the question" else messages, changed=name)
            try:
                has_effect = self._rendered(changed, where) != rendered
            except DataError:  # the template asks for it
                has_effect = True
            if not has_effect:
                raise DataError(
                    f"{where}: the tokenizer's chat template leaves {name} out of the prompt: name another with "
                    "data.chat_template" + (f", or leave {name} out" if name.startswith("data.") else "")
                )
            self._unproved.discard(name)

    def _rendered(self, messages: list[Any], where: str) -> str:
        continues = messages[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=not continues,
                    continue_final_message=continues,
                    **self.variables,
                )
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the tokenizer's chat template is no Jinja: {error.message} in line {error.lineno}: mend it, or name "
                "another file with data.chat_template"
            ) from error
        except TemplateError as error:
            reason = one_line(error)
            remedy = (
                "leave out data.system_prompt and system messages" if "system" in reason.lower()
                else "change the conversation, or set data.use_chat_template=false"
            )  # fmt: skip
            raise DataError(f"{where}: the tokenizer's chat template refuses it ({reason}): {remedy}") from error
        except Exception as error:  # whatever Python raises on its expressions, and transformers on what it made
            raise _of_template(error, where) from error


def _reads(template: str, name: str) -> bool:
    """Whether a template reads a variable: comments and texts that name it do not, nor does one that it sets itself."""
    try:
        return name in meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        )
    except TemplateError:  # tags of other extensions
        return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _of_template(error: Exception, where: str = "") -> DataError:
    """The error of a template that cannot be used."""
    at = f"{where}: " if where else ""
    return DataError(
        f"{at}the tokenizer's chat template fails ({type(error).__name__}: {one_line(error)}): mend it, or name "
        "another with data.chat_template"
    )


def thoughts_at_the_end(prompt: str) -> str:
    """The thoughts that a prompt ends with, opened (``<think>``) or empty (``<think></think>``); empty text if none.

    A prompt that has only the end of thoughts gets the tag that opens them.
    """
    found = _THOUGHTS_AT_THE_END.search(prompt)
    if found is None:
        return ""
    return found[0] if found[0].startswith("<think>") else f"<think>{found[0]}"


def read_chat_template(path: str) -> str:
    """The text of a Jinja file.

    Raises:
        DataError: There is no such file, or it is empty or no UTF-8.
    """
    try:
        template = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={path}: cannot be read ({error}): name a Jinja file in UTF-8") from error
    if not template.strip():
        raise DataError(f"data.chat_template={path}: the file is empty: name a Jinja file")
    return template


def few_shot_messages(source: DataSource) -> list[Message]:
    """Solved examples as messages of user and assistant, word for word.

    Args:
        source: Rows with a ``question`` and an ``answer``, texts or numbers.

    Raises:
        DataError: A row lacks one of them.
    """
    messages: list[Message] = []
    for number, row in enumerate(source.rows(), start=1):
        for column, role in (("question", "user"), ("answer", "assistant")):
            text = row.get(column)
            if not isinstance(text, str | int | float) or not str(text).strip():
                raise DataError(
                    f"data.few_shot: {source!r}, row {number} has no text {column!r}: an example is a question and the "
                    "answer as the policy should write it"
                )
            messages.append({"role": role, "content": str(text)})
    if not messages:
        raise DataError(f"data.few_shot: {source!r} holds no example: give it rows, or leave it out")
    return messages
