"""Tokenizers: loading, decoding, the tokens that end a response, a fingerprint of the vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache

from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, EngineError
from rpo_lightning.core.hashing import short_name
from rpo_lightning.policy.load import not_loaded, resolve_policy

# Frame tokens: those that a tokenizer names as such, and words that mark them in chat templates of published models.
_FRAME_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_FRAME_WORDS = frozenset(
    {
        "s", "bos", "eos", "pad", "unk", "sep", "cls", "mask", "eod", "eot", "eom", "eotid", "eomid", "beginoftext",
        "endoftext", "beginofsentence", "endofsentence", "imstart", "imend", "imsep", "startheaderid", "endheaderid",
        "startofturn", "endofturn", "startofturntoken", "endofturntoken", "startofrole", "endofrole", "turn",
        "start", "end", "return", "inst", "systemprompt", "user", "assistant", "system", "human", "bot", "tool",
        "observation", "developer", "usertoken", "chatbottoken", "systemtoken", "bostoken", "eostoken", "padtoken",
    }
)  # fmt: skip


def stop_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response, as the tokenizer and the generation config name them.

    Raises:
        EngineError: Neither names an end-of-sequence token.
    """
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise EngineError(
            "neither the tokenizer nor generation_config.json of the policy names an end-of-sequence token: set "
            "eos_token_id in generation_config.json"
        )
    return ids


def require_stop(stop: Iterable[str | int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what is to end a response besides end-of-sequence tokens.

    Raises:
        ConfigurationError: It is a text instead of a list of texts, a text is empty, or a token id is not in the
            vocabulary.
    """
    if isinstance(stop, str):
        raise ConfigurationError(f"model.stop={stop!r} is no list: write [{stop!r}]")
    for part in stop:
        if part == "" or (isinstance(part, int) and not 0 <= part < len(tokenizer)):
            raise ConfigurationError(
                f"model.stop has {part!r}: give texts, or token ids from 0 to {len(tokenizer) - 1}"
            )


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy.

    Args:
        name: As in ``resolve_policy``.
        trust_remote_code: Whether Python code that the folder brings may be executed.

    Raises:
        ConfigurationError: No tokenizer is found there.
    """
    folder = resolve_policy(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what tokenizers raises has no class of its own
        raise not_loaded(name, "tokenizer", error) from error


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids as rewards see it.

    Special tokens that only frame the text are left out: begin, end, padding and turn markers. Special tokens that are
    content stay: ``<think>``, ``<answer>`` and channel markers, for example.
    """
    frames = _frame_tokens(tokenizer, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    if frames is None:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    text_ids = token_ids if frames.isdisjoint(token_ids) else [token for token in token_ids if token not in frames]
    return str(tokenizer.decode(list(text_ids), skip_special_tokens=False))


class Continuations:
    """Texts of responses that begin with the same tokens. The beginning is decoded once, where that is exact.

    Tokenizers of bytes decode tokens one by one, so texts add up, unless the beginning ends within a character. Others
    may treat a token by its neighbours; with these every response is decoded as a whole.

    Args:
        tokenizer: The tokenizer.
        prefix_ids: The beginning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._prefix_ids = prefix_ids

    def text(self, suffix_ids: tuple[int, ...]) -> str:
        """Text of the beginning and a suffix, as ``decode`` gives it."""
        if self._prefix_text is None:
            return decode(self._tokenizer, self._prefix_ids + suffix_ids)
        return self._prefix_text + decode(self._tokenizer, suffix_ids)

    @cached_property
    def _prefix_text(self) -> str | None:
        """Text of the beginning; ``None`` if it may depend on what follows."""
        if not self._prefix_ids or not _decodes_bytes(self._tokenizer):
            return None
        text = decode(self._tokenizer, self._prefix_ids)
        return None if text.endswith("\N{REPLACEMENT CHARACTER}") else text


def _decodes_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer decodes tokens to bytes and does nothing to the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    return backend is not None and isinstance(backend.decoder, ByteLevel) and not cleans


@lru_cache(maxsize=8)
def _frame_tokens(tokenizer: PreTrainedTokenizerBase, *_changes: int | None) -> frozenset[int] | None:
    """Special tokens that are no content; ``None`` if none is content. The cache holds it until an argument changes."""
    ids = set(tokenizer.all_special_ids)
    ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in _FRAME_NAMES}
    texts = dict(zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True))
    frames = frozenset(i for i, text in texts.items() if i in named or _letters(str(text)) in _FRAME_WORDS)
    return None if len(frames) == len(ids) else frames


def tokens_that_match(tokenizer: PreTrainedTokenizerBase, pattern: str, setting: str) -> list[bool]:
    """For each token id of the vocabulary, whether its text has a match of a regular expression.

    Args:
        tokenizer: The tokenizer.
        pattern: The expression. It is searched in the text of one token at a time.
        setting: Names the setting in messages.

    Raises:
        ConfigurationError: It is no regular expression, or no token has a match.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(f"{setting}={pattern!r} is no regular expression: {error}") from error
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
    matches = [expression.search(text) is not None for text in texts]
    if not any(matches):
        raise ConfigurationError(
            f"{setting}={pattern!r} matches no token of the policy's tokenizer: it is searched in single tokens, so "
            "name what one of them holds"
        )
    return matches


def _letters(token: str) -> str:
    """Letters and digits of a token: ``imstart`` for ``<|im_start|>``."""
    return "".join(character for character in token.lower() if character.isalnum())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary. Where it is equal, token ids mean the same."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return short_name(vocabulary)
