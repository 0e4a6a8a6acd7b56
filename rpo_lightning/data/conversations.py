"""Conversations in the forms that data sets are published in, as messages of a role and a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# ShareGPT's names of the speakers, and others' that mean the same.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def read_messages(question: Any) -> list[dict[str, Any]]:
    """The messages of a question.

    Args:
        question: A text, which is one message of the user, or a list of messages: ``{role, content}`` (OpenAI, verl) or
            ``{from, value}`` (ShareGPT). A content may be a list of text parts. Such a list may be written as JSON.

    Returns:
        Messages with ``role``, ``content`` (text) and whatever else a message has.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(question, str):
        question = _written_as_json(question) or question
    if isinstance(question, str | int | float) and not isinstance(question, bool):
        return [{"role": "user", "content": str(question)}]
    if not isinstance(question, list | tuple):
        raise ValueError(f"its question is no text and no conversation, but of type {type(question).__name__}")
    return [_message(message) for message in question]


def _written_as_json(text: str) -> list[Any] | None:
    """The messages that a text is, as tables without nested columns hold them; ``None`` if it is an ordinary text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_conversation = found and all(
        isinstance(m, Mapping) and ("role" in m or {"from", "value"} <= m.keys()) for m in found
    )
    return found if is_conversation else None


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last; the last message's text if there is no user."""
    texts = [str(message["content"]) for message in messages if message["role"] == "user"]
    return texts[-1] if texts else str(messages[-1]["content"])


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"its conversation has a message that is no object: {str(message)[:40]!r}")
    rest = dict(message)
    role = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content", None)
    content = rest.pop("value", None) if content is None else content
    if role is None or content is None:
        raise ValueError(
            f"its conversation has a message with the keys {', '.join(map(str, message)) or 'none'}: messages need "
            "role and content, or from and value"
        )
    return {"role": _ROLES.get(str(role), str(role)), "content": _text(content), **rest}


def _text(content: Any) -> str:
    """A content that may be a list of parts."""
    if not isinstance(content, list | tuple):
        return str(content)
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
            parts.append(str(part["text"]))
        else:
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"its conversation has a part of type {kind}: policies read text only")
    return "".join(parts)
