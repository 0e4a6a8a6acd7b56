"""Turns experience caches into tables with text, and tables of responses into caches.

An exported row has the response as text (``response``) and as token ids (``token_ids``). Importing it again takes the
ids, which must decode to the text. A row with text only, such as a teacher's solution, is tokenised here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rpo_lightning.cache.cache import IMPORTED_STEP, CachedResponse, ExperienceCache
from rpo_lightning.cache.candidates import fill
from rpo_lightning.cache.refresh import RefreshRule
from rpo_lightning.core.errors import CacheError
from rpo_lightning.core.files import write_json_lines, write_parquet
from rpo_lightning.core.types import Prompt, Sample
from rpo_lightning.policy.tokenizer import decode
from rpo_lightning.rewards import Grader


def exported_rows(
    cache: ExperienceCache, tokenizer: PreTrainedTokenizerBase, questions: Mapping[str, Prompt]
) -> Iterator[dict[str, Any]]:
    """Yield the responses of a cache as rows.

    Args:
        cache: The cache.
        tokenizer: Decodes token ids.
        questions: Prompts by uid. Question and answer of other uids are ``None``.
    """
    for entry in cache:
        prompt = questions.get(entry.uid)
        for response in entry.anchors:
            ids = response.token_ids.tolist()
            yield {
                "uid": entry.uid,
                "question": prompt.text if prompt else None,
                "answer": str(prompt.answer) if prompt else None,
                "response": decode(tokenizer, ids),
                "token_ids": ids,
                "tokens": len(ids),
                "reward": response.reward,
                "correct": response.correct,
                "finished": response.finished,
                "step": response.step,
                "spans": [list(span) for span in response.spans],
                "visits": entry.visits,
            }


def write_rows(rows: Iterable[Mapping[str, Any]], out: str | Path) -> None:
    """Write rows to a ``.parquet`` or ``.jsonl`` file, or to a folder of ``datasets``.

    JSON Lines are written row by row; the others hold all rows in memory.
    """
    path = Path(out)
    if path.suffix == ".parquet":
        return write_parquet(list(rows), path)
    if path.suffix in (".jsonl", ".json"):
        return write_json_lines(rows, path)
    from datasets import Dataset

    Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(path))


@dataclass(frozen=True)
class ImportReport:
    """Counts of an import.

    Attributes:
        matched: Rows whose question is one training question.
        unmatched: Rows whose question is no training question, or several.
        overlong: Rows whose response is longer than the limit.
        right: Matched rows whose response the verifier accepted.
        responses: Questions that have a response after the import.
    """

    matched: int
    unmatched: int
    overlong: int
    right: int
    responses: int


def import_responses(
    cache: ExperienceCache,
    prompts: Sequence[Prompt],
    rows: Iterable[Mapping[str, Any]],
    columns: tuple[Sequence[str], str],
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    response_limit: int,
    where: str,
    refresh: RefreshRule,
    only_correct: bool = False,
) -> ImportReport:
    """Cache the best responses to each question from a table, as many as the refresh rule keeps.

    Args:
        cache: The cache to fill.
        prompts: The training questions, as the run that will use the cache reads them.
        rows: Rows with a response and its question, as ``uid`` or as text.
        columns: Columns that may hold the question, and the column of the response's text.
        tokenizer: The policy's tokenizer.
        grader: Grades the responses.
        response_limit: Longer responses are left out, because a run could not continue them. In tokens.
        where: Names the source in messages.
        refresh: Says how many responses to a question are cached, and of which verdict.
        only_correct: Whether to leave out responses that the verifier does not accept.

    Raises:
        CacheError: A row has no response, or its token ids are not this tokenizer's.
    """
    known = {p.uid: p for p in prompts}
    texts = Counter(p.text for p in prompts)
    by_text = {p.text: p for p in prompts if texts[p.text] == 1}
    question_columns, response_column = columns
    found: list[_Response] = []
    unmatched = overlong = 0
    size = cache.vocabulary_size or len(tokenizer)  # a policy may have more rows than its tokenizer has tokens
    for number, row in enumerate(rows, start=1):
        text = next((str(row[c]) for c in question_columns if row.get(c) is not None), "")
        prompt = known.get(str(row.get("uid"))) or by_text.get(text)
        if prompt is None:
            unmatched += 1
            continue
        ids = _token_ids(row, response_column, tokenizer, size, prompt.opening, f"{where}, row {number}")
        if len(ids) > response_limit:
            overlong += 1
            continue
        # Text without ids counts as finished; nothing says whether it is.
        finished = row.get("finished", ids[-1] == tokenizer.eos_token_id)
        if not isinstance(finished, bool):
            raise CacheError(f"{where}, row {number}: finished is {str(finished)[:40]!r}: it is true or false")
        found.append((prompt, ids, finished))
    of_questions: dict[str, list[CachedResponse]] = {}
    for prompt, response in _graded(found, tokenizer, grader):
        of_questions.setdefault(prompt.uid, []).append(response)
    right = sum(response.correct for responses in of_questions.values() for response in responses)
    for uid, responses in of_questions.items():
        best_first = sorted(responses, key=lambda response: -response.reward)
        fill(cache.entry(uid), refresh, [r for r in best_first if r.correct or not only_correct])
    return ImportReport(len(found), unmatched, overlong, right, sum(entry.has_anchor for entry in cache))


# A question, a response's token ids, and whether the response is finished.
_Response = tuple[Prompt, list[int], bool]


def _graded(
    found: Sequence[_Response], tokenizer: PreTrainedTokenizerBase, grader: Grader
) -> Iterator[tuple[Prompt, CachedResponse]]:
    groups = [
        [Sample(p.text, p.opening + decode(tokenizer, i), p.answer, len(i), finished, uid=p.uid, row=p.row)]
        for p, i, finished in found
    ]
    for (prompt, ids, _), graded in zip(found, grader.grade(groups) if groups else [], strict=True):
        sample, spans = graded.samples[0], ((IMPORTED_STEP, len(ids)),)
        array = np.asarray(ids, dtype=np.int32)
        yield prompt, CachedResponse(array, graded.rewards[0], sample.is_correct, sample.finished, spans)


def _token_ids(
    row: Mapping[str, Any], column: str, tokenizer: PreTrainedTokenizerBase, size: int, opening: str, where: str
) -> list[int]:
    """The response's token ids, below ``size``, without the thoughts that the prompt has opened (``opening``)."""
    text = row.get(column)
    if row.get("token_ids") is not None:
        ids = row["token_ids"]
        are_ids = isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < size for i in ids)
        if not are_ids or (text is not None and decode(tokenizer, ids) != text):
            raise CacheError(
                f"{where}: its token ids are not this tokenizer's (they do not decode to its {column!r}); "
                "drop the column 'token_ids', and the text is tokenised"
            )
        return list(ids)
    if text is not None and not isinstance(text, str):
        raise CacheError(f"{where}: its {column!r} is no text, but of type {type(text).__name__}")
    if not text:
        raise CacheError(
            f"{where}: has neither {column!r} nor token ids; name the column of the response with --response_column"
        )
    said = text.removeprefix(opening)
    if opening.strip() == "<think>":  # whatever blanks follow the tag
        said = said.removeprefix("<think>").lstrip() if said.startswith("<think>") else said
    ids = list(tokenizer(said, add_special_tokens=False)["input_ids"])
    return [*ids, int(tokenizer.eos_token_id)] if tokenizer.eos_token_id is not None else ids
