"""Bad cache files: changed by hand, torn, or of other programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.parquet import SCHEMA, write_cache
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.data.prompts import PromptBuilder
from rpo_lightning.policy.tokenizer import load_tokenizer, tokenizer_fingerprint
from rpo_lightning.rewards import ExactMatchVerifier
from tests.faults.bad_inputs.case import BadInput, run

FIT = run("fit", "--cache.path bad.parquet")
STATS, SHOW = (
    f"cache {name} --path bad.parquet --tokenizer embedded:arithmetic-reasoner" for name in ("stats", "show")
)


@cache
def _fingerprint_and_uids() -> tuple[str, tuple[str, ...]]:
    tokenizer = load_tokenizer("embedded:arithmetic-reasoner")
    prompts, _ = PromptBuilder(tokenizer, ExactMatchVerifier(), 1024).build(ArithmeticChain(8, 3))
    return tokenizer_fingerprint(tokenizer), tuple(prompt.uid for prompt in prompts)


def good() -> None:
    """Write a cache for the questions of ``run.yaml``."""
    fingerprint, uids = _fingerprint_and_uids()
    made = ExperienceCache(fingerprint)
    for uid in uids:
        made.remember(uid, CachedResponse(np.array([5, 6, 7, 8]), 1.0, True, True, ((-1, 2), (0, 2))))
    write_cache(made, "bad.parquet")


def changed(
    change: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    metadata: Mapping[str, str] = {},
    schema: pa.Schema = SCHEMA,
) -> Callable[[], None]:
    """A function that writes a cache file whose rows, metadata or columns were changed."""

    def make() -> None:
        good()
        table = pq.read_table("bad.parquet")
        rows = table.to_pylist()
        change(rows)
        told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata({**told, **metadata})), "bad.parquet")

    return make


def with_value(column: str, value: Any) -> Callable[[], None]:
    """A function that writes a cache file whose second row has another value."""
    return changed(lambda rows: rows[1].update({column: value}))


def _of_type(column: str, kind: pa.DataType, value: Any) -> Callable[[], None]:
    schema = SCHEMA.set(SCHEMA.get_field_index(column), pa.field(column, kind))
    return changed(lambda rows: [row.update({column: value}) for row in rows], schema=schema)


def _torn() -> None:
    good()
    Path("bad.parquet").write_bytes(Path("bad.parquet").read_bytes()[:-30])


def _declares_more_than_it_holds() -> None:
    """The footer of a file whose one row group is named again and again, until no memory could hold its tokens."""
    good()
    schema, count = pq.read_schema("bad.parquet"), 2**24
    tokens = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int32)))
    others = {field.name: pa.nulls(1, field.type) for field in schema}
    parts: list[pq.FileMetaData] = []
    pq.write_to_dataset(pa.table({**others, "token_ids": tokens}, schema), "parts", metadata_collector=parts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    while parts[0].num_rows * count * 4 < 2 * memory:
        parts[0].append_row_groups(parts[0])
    parts[0].write_metadata_file("bad.parquet")
    shutil.rmtree("parts")


# fmt: off
CACHE_FILES = [
    BadInput("a missing cache file", FIT,
             line="bad.parquet: no such cache file: check the path"),
    BadInput("a folder for a cache file", STATS, files={"bad.parquet/part": ""},
             line="bad.parquet: a folder: name the cache file in it"),
    BadInput("an empty cache file", STATS, files={"bad.parquet": ""},
             line="bad.parquet: not a readable Parquet file (…): name a whole cache file"),
    BadInput("a cache file that is no Parquet", STATS, files={"bad.parquet": "{}"},
             line="bad.parquet: not a readable Parquet file (…): name a whole cache file"),
    BadInput("a torn cache file", STATS, make=_torn,
             line="bad.parquet: not a readable Parquet file (…): name a whole cache file"),
    BadInput("another program's table", STATS, make=lambda: pq.write_table(pa.table({"a": [1]}), "bad.parquet"),
             line="bad.parquet: not an experience cache (no tokenizer fingerprint in its metadata): name a file that this package wrote"),
    BadInput("a cache of a later release", STATS, make=changed(metadata={"version": "99"}),
             line="bad.parquet: cache format 99, this release reads formats 2 and 3: build a new cache"),
    BadInput("a format version that is no number", STATS, make=changed(metadata={"version": "three"}),
             line="bad.parquet: cache format three, this release reads formats 2 and 3: build a new cache"),
    BadInput("a cache of another tokenizer", STATS, make=changed(metadata={"tokenizer": "other"}),
             line="bad.parquet: made with another tokenizer (fingerprint other, this policy's is d8057a88592cb516), so its token ids mean other text: build a new cache"),
    BadInput("a cache of other questions", FIT + " --data.train.seed 5", make=good,
             line="bad.parquet: made for another data set, none of its 8 questions is among the 8 training questions: build a new cache, or set data.uid_column as for the run that made it"),
    BadInput("a cache without a column", STATS, make=changed(schema=SCHEMA.remove(3)),
             line="bad.parquet: its columns are not an experience cache's, which are uid, slot, token_ids, reward, correct, finished, spans, visits, restart, state: build a new cache"),
    BadInput("token ids that are fractions", STATS, make=_of_type("token_ids", pa.list_(pa.float32()), [1.5]),
             line="bad.parquet: its columns are not an experience cache's, which are uid, slot, token_ids, reward, correct, finished, spans, visits, restart, state: build a new cache"),
    BadInput("more tokens than any memory holds", STATS, make=_declares_more_than_it_holds,
             line="bad.parquet: declares … rows that take … GiB, and this machine has … GiB: check where the file comes from, or split it"),
]

CACHE_ROWS = [
    BadInput("a negative token id", STATS, make=with_value("token_ids", [5, -1, 7, 8]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): token id -1 is negative: build a new cache"),
    BadInput("a token id outside the vocabulary", FIT, make=with_value("token_ids", [5, 6, 7, 48]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): token id 48 is outside the policy's vocabulary of 48: build a new cache"),
    BadInput("a token id that is null", STATS, make=with_value("token_ids", [5, None, 7, 8]),
             line="bad.parquet: 1 empty values in its column 'token_ids': build a new cache"),
    BadInput("a response without tokens", STATS, make=with_value("token_ids", []),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its response has no token: build a new cache"),
    BadInput("an identifier that is null", STATS, make=with_value("uid", None),
             line="bad.parquet: 1 empty values in its column 'uid': build a new cache"),
    BadInput("a question twice", STATS, make=changed(lambda rows: rows.append(dict(rows[0]))),
             line="bad.parquet, row 9 (question '7d37ed4371b46a9d'): its question has a row before it: build a new cache"),
    BadInput("a further response without a first", STATS, make=with_value("slot", 1),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its question has no row of slot 0 before that of slot 1: build a new cache"),
    BadInput("a slot that there is not", STATS, make=with_value("slot", 10_000),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): slot 10000, slots are numbered from 0 to 255: build a new cache"),
    BadInput("a reward that is NaN", STATS, make=with_value("reward", float("nan")),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its reward is not a finite number: build a new cache"),
    BadInput("spans that are too short", STATS, make=with_value("spans", [{"step": 0, "count": 2}]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its spans do not add up to the tokens of its response: build a new cache"),
    BadInput("a span of a negative number of tokens", STATS,
             make=with_value("spans", [{"step": 0, "count": -2}, {"step": 0, "count": 6}]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): a span has fewer than 1 token, or a step below -1: build a new cache"),
    BadInput("a negative number of visits", STATS, make=with_value("visits", -1),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): -1 visits: build a new cache"),
]

NOTES = [
    BadInput("notes on a question that are no JSON", STATS, make=with_value("state", "{"),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its state cannot be used (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): build a new cache"),
    BadInput("notes on a question that are a list", STATS, make=with_value("state", "[1]"),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its state cannot be used (an object is expected, it is a list): build a new cache"),
    BadInput("notes on a question that are nested without end", STATS, make=with_value("state", "[" * 100_000),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its state cannot be used (it is nested too deeply): build a new cache"),
    BadInput("notes on a question with NaN", STATS, make=with_value("state", '{"level": NaN}'),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): its state cannot be used (NaN is no finite number): build a new cache"),
    BadInput("notes on a question that the cut cannot use", FIT,
             make=with_value("state", '{"shortest_length": "long"}'),
             line="bad.parquet: what FractionOfShortestCut noted on question 66627f6029f5a4b8 cannot be used (shortest_length is 'long'): build a new cache, or use another cache.cut"),
    BadInput("an interval with one end", SHOW + " --cut BisectionCut",
             make=with_value("state", '{"interval": [0.5]}'),
             line="bad.parquet: what BisectionCut noted on question 66627f6029f5a4b8 cannot be used (interval is '[0.5]'): build a new cache, or use another cache.cut"),
    BadInput("notes on all questions with NaN", SHOW + " --cut TargetSuccessCut",
             make=changed(metadata={"shared": '{"success": {"mean": [NaN, 1, 1, 0]}}'}),
             line="bad.parquet: its notes on all questions cannot be used (NaN is no finite number): build a new cache"),
    BadInput("success rates of another shape", SHOW + " --cut TargetSuccessCut",
             make=changed(metadata={"shared": '{"success": {"mean": [1], "covariance": []}}'}),
             line="bad.parquet: what TargetSuccessCut noted on all questions cannot be used (success is no object with a mean of 4 numbers and their covariance): build a new cache, or use another cache.cut"),
]
# fmt: on
