"""The experience cache: what is remembered of every question. Knows nothing of Lightning.

At most one response per question is held, as token ids (the published code
keeps text, which drifts when it is encoded again), with the reward it got and the update each of its
tokens was generated at. What a cut strategy wants to remember of a question lies in ``state`` and is
saved with the entry.

Everything is held in columns, so that a million questions cost little more than the bytes of their tokens
(:mod:`rpo_lightning.cache.token_blocks`). :class:`CacheEntry` and :class:`CachedResponse` are views of a question's
row.

On disk a cache is one Parquet file, a row per question (:mod:`rpo_lightning.cache.parquet`). In a checkpoint it is a
dictionary of tensors and primitives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rpo_lightning.cache.spans import flat_spans, initial_tokens, nested_spans, newest_step
from rpo_lightning.cache.token_blocks import TokenBlocks
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.types import Spans

FORMAT_VERSION = 2
# The "update" at which tokens that came from elsewhere were generated.
IMPORTED_STEP = -1

# What is known of a question besides its tokens, their spans and the state. The last two columns follow from the
# spans: the update of the newest tokens, and how many were there before the first update.
_FACTS = np.dtype(
    [
        ("visits", np.int64),
        ("restart", np.bool_),
        ("reward", np.float64),
        ("correct", np.bool_),
        ("finished", np.bool_),
        ("step", np.int64),
        ("initial_tokens", np.int64),
    ]
)
_SAVED_FACTS = ("visits", "restart", "reward", "correct", "finished")


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A response that later visits of its question are cut from.

    Attributes:
        token_ids: The whole response, int32, the end-of-sequence token included if it was sampled.
        reward: The total reward it got.
        correct: Whether the verifier accepted it.
        finished: Whether it ended by itself.
        spans: ``(step, count)`` runs: at which update its tokens were generated, in order; -1 for those that
            came from elsewhere.
    """

    token_ids: np.ndarray
    reward: float
    correct: bool
    finished: bool
    spans: Spans

    @property
    def step(self) -> int:
        """The update at which its newest tokens were generated."""
        return newest_step(self.spans)

    def __len__(self) -> int:
        return len(self.token_ids)


class CacheEntry:
    """What is remembered of one question: a view of its row in a cache."""

    __slots__ = ("_cache", "_number", "uid")

    def __init__(self, cache: ExperienceCache, uid: str, number: int) -> None:
        self.uid = uid
        self._cache = cache
        self._number = number

    @property
    def response(self) -> CachedResponse | None:
        """The cached response, if there is one; :meth:`ExperienceCache.remember` puts another in its place."""
        return self._cache._response(self._number)

    @property
    def visits(self) -> int:
        """Groups that were sampled for the question."""
        return int(self._cache._facts["visits"][self._number])

    @visits.setter
    def visits(self, value: int) -> None:
        self._cache._facts["visits"][self._number] = value

    @property
    def restart(self) -> bool:
        """Whether the next visit starts without a prefix."""
        return bool(self._cache._facts["restart"][self._number])

    @restart.setter
    def restart(self, value: bool) -> None:
        self._cache._facts["restart"][self._number] = value

    @property
    def state(self) -> dict[str, Any]:
        """What the cut strategy remembers of the question (JSON values, saved with the entry)."""
        return self._cache._states.setdefault(self._number, {})

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._cache._states[self._number] = value


class ExperienceCache:
    """Entries by question uid.

    Args:
        tokenizer_fingerprint: Identifies the vocabulary that the token ids belong to.
    """

    def __init__(self, tokenizer_fingerprint: str) -> None:
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._numbers: dict[str, int] = {}  # in the order of their first visits: 0, 1, 2, …
        self._facts = np.zeros(0, _FACTS)
        self._tokens = TokenBlocks()
        self._spans: list[Spans] = []
        self._states: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[CacheEntry]:
        return (CacheEntry(self, uid, number) for uid, number in self._numbers.items())

    def __contains__(self, uid: object) -> bool:
        return uid in self._numbers

    def get(self, uid: str) -> CacheEntry | None:
        """The entry of a question, or ``None`` before its first visit."""
        number = self._numbers.get(uid)
        return None if number is None else CacheEntry(self, uid, number)

    def entry(self, uid: str) -> CacheEntry:
        """The entry of a question, made if there is none."""
        return CacheEntry(self, uid, self._number(uid))

    def remember(self, uid: str, response: CachedResponse) -> None:
        """Cache a response in the place of whatever was cached of the question; its tokens are copied."""
        number = self._number(uid)
        self._tokens[number] = response.token_ids
        row = self._facts[number]
        row["reward"], row["correct"], row["finished"] = response.reward, response.correct, response.finished
        row["step"] = response.step
        row["initial_tokens"] = initial_tokens(response.spans)
        self._spans[number] = response.spans

    def statistics(self, step: int) -> dict[str, float]:
        """Health of the cache at update ``step``.

        Returns:
            ``entries`` and ``responses`` (counts), and over the responses: ``correct_share``, mean
            ``length``, mean ``age`` (updates since the newest tokens), and ``initial_token_share``,
            the share of tokens that were there before the first update, from the starting policy or elsewhere.
        """
        # Without a response all facts of it are 0, so that whole columns can be summed.
        facts, tokens = self._facts[: len(self)], self._tokens.live_tokens
        responses = len(self._tokens)
        result = {"entries": float(len(self)), "responses": float(responses)}
        if responses:
            result |= {
                "correct_share": float(facts["correct"].sum() / responses),
                "length": tokens / responses,
                "age": float(step - np.maximum(facts["step"], 0).sum() / responses),
                "initial_token_share": float(facts["initial_tokens"].sum() / max(tokens, 1)),
            }
        return result

    def forget_updates(self) -> None:
        """Have all tokens come from elsewhere: update numbers of another run mean nothing in this one."""
        for number, length in enumerate(self._tokens.lengths(len(self)).tolist()):
            if length >= 0:
                self._spans[number] = ((IMPORTED_STEP, length),)
                self._facts["step"][number], self._facts["initial_tokens"][number] = IMPORTED_STEP, length

    def _number(self, uid: str) -> int:
        number = self._numbers.setdefault(uid, len(self._numbers))
        if number == len(self._spans):
            self._spans.append(())
            if number == len(self._facts):
                facts = np.zeros(max(2 * number, 1024), _FACTS)
                facts[:number] = self._facts
                self._facts = facts
        return number

    def _response(self, number: int) -> CachedResponse | None:
        if number not in self._tokens:
            return None
        _, _, reward, correct, finished, _, _ = self._facts[number].item()
        return CachedResponse(self._tokens[number], reward, correct, finished, self._spans[number])

    # -- saving and loading ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole cache as tensors and primitives (``torch.load(weights_only=True)`` reads it).

        Tokens are not copied: the state looks at the cache's own blocks, which are never written to again.
        """
        facts = self._facts[: len(self)]
        span_counts, spans = flat_spans(self._spans)
        return {
            "version": FORMAT_VERSION,
            "tokenizer": self.tokenizer_fingerprint,
            # One text each: a million small ones would be remembered one by one while they are written.
            "uids": json.dumps(list(self._numbers)),
            "states": json.dumps({number: state for number, state in self._states.items() if state}),
            "facts": {name: torch.from_numpy(facts[name].copy()) for name in _SAVED_FACTS},
            "tokens": self._tokens.state_dict(),
            "span_counts": torch.from_numpy(span_counts),
            "spans": torch.from_numpy(spans),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by a saved state, whose tokens are taken over without a copy.

        Raises:
            CacheError: The state is of another version or tokenizer.
        """
        self.require_same_origin(state["version"], state["tokenizer"], "the checkpoint's cache")
        uids = json.loads(state["uids"])
        loaded = ExperienceCache(self.tokenizer_fingerprint)
        loaded._numbers = {uid: number for number, uid in enumerate(uids)}
        loaded._states = {int(number): of_entry for number, of_entry in json.loads(state["states"]).items()}
        loaded._spans = nested_spans(state["span_counts"].numpy(), state["spans"].numpy())
        loaded._tokens.load_state_dict(state["tokens"])
        loaded._facts = np.zeros(len(uids), _FACTS)
        for name in _SAVED_FACTS:
            loaded._facts[name] = state["facts"][name].numpy()
        loaded._facts["step"] = [newest_step(spans) for spans in loaded._spans]
        loaded._facts["initial_tokens"] = [initial_tokens(spans) for spans in loaded._spans]
        vars(self).update(vars(loaded))

    def require_same_origin(self, version: int, tokenizer: str, where: str) -> None:
        """Check that what was saved can be read by this release and means the same to this policy.

        Raises:
            CacheError: It is of another version or tokenizer.
        """
        if version != FORMAT_VERSION:
            raise CacheError(f"{where}: cache format {version}, this release reads format {FORMAT_VERSION}")
        if tokenizer != self.tokenizer_fingerprint:
            raise CacheError(
                f"{where}: made with another tokenizer (fingerprint {tokenizer}, this policy's is "
                f"{self.tokenizer_fingerprint}): token ids would mean other text; build a new cache"
            )
