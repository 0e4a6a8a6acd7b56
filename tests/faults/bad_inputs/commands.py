"""Bad commands, and bad input of commands besides ``fit``."""

from __future__ import annotations

import json
from typing import Any

from rpo_lightning.data.arithmetic import ArithmeticChain
from tests.faults.bad_inputs.caches import SHOW, good, with_value
from tests.faults.bad_inputs.case import BadInput, run
from tests.faults.bad_inputs.questions import GOOD

_IMPORT = run("cache import", "--path rows.jsonl")
_EXPORT = run("cache export", "--path bad.parquet")
_QUESTION = next(iter(ArithmeticChain(8, 3).rows()))["question"]
_METRICS = {"folder/metrics.csv": "step,reward/mean\n0,1\n"}


def _import(what: str, *, line: str, words: str = "", question: Any = _QUESTION, **row: Any) -> BadInput:
    rows = {"rows.jsonl": json.dumps({"question": question, **row}) + "\n"}
    return BadInput(what, f"{_IMPORT} {words}".strip(), line, rows)


# fmt: off
COMMANDS = [
    BadInput("no command", "",
             line="no command given; the commands are fit, validate, test, predict, plan, segments, cache, report, memory"),
    BadInput("a command that there is not", "train --config run.yaml",
             line="train: no such command; the commands are fit, validate, test, predict, plan, segments, cache, report, memory"),
    BadInput("a command of the cache that there is not", "cache look",
             line="cache look: no such command; the commands are build, import, export, show, stats"),
    BadInput("an option that there is not", SHOW + " --size 3", make=good,
             line="size: no such setting: --help lists those that there are"),
    BadInput("an option that is left out", "cache show --path bad.parquet", make=good,
             line="tokenizer is not set: give it in a config or as --tokenizer"),
    BadInput("a folder for the cache that is built", run("cache build", "--out folder"), files={"folder/part": ""},
             line="--out=folder: a folder has this name: name a file"),
    BadInput("a cache of no samples", run("cache build", "--cache.initial_samples 0"),
             line="cache.initial_samples and cache.initial_batch_size must be at least 1, got 0 and 64"),
    BadInput("an export of another kind", _EXPORT + " --out out.csv", make=good,
             line="out.csv: tables are written as .parquet or .jsonl, or as a folder, whose name has no ending"),
    BadInput("an export of a cache with bad tokens", _EXPORT + " --out out.jsonl",
             make=with_value("token_ids", [5, 48, 7, 8]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): token id 48 is outside the policy's vocabulary of 48: build a new cache"),
    BadInput("an export to below a file", _EXPORT + " --out run.yaml/out.jsonl", make=good,
             line="--out=run.yaml/out.jsonl: nothing can be written there: name another place"),
    BadInput("a question that a cache lacks", SHOW + " --uid nobody", make=good,
             line="bad.parquet: no response for question 'nobody'; --entries lists some"),
    BadInput("a negative number of entries", SHOW + " --entries -1", make=good,
             line="--entries must be at least 1, got -1"),
    BadInput("a cut that there is not", SHOW + " --cut NoSuchCut", make=good,
             line="cut: no class of this kind is called NoSuchCut: name one of the package's, or your own by its import path"),
    BadInput("notes that the cut cannot use, to be shown", SHOW,
             make=with_value("state", '{"shortest_length": "long"}'),
             line="bad.parquet: what FractionOfShortestCut noted on question 66627f6029f5a4b8 cannot be used (shortest_length is 'long'): build a new cache, or use another cache.cut"),
    BadInput("no memory", run("memory", "--gpu_memory_gib 0"),
             line="--gpu_memory_gib must be above 0 and finite, got 0"),
    BadInput("an estimate for a group of none", run("memory", "--model.group_size 0"),
             line="model.group_size must be at least 2, got 0"),
    BadInput("an estimate for no devices", run("memory", "--trainer.devices 0"),
             line="trainer.devices=0: give a number from 1 on, a list of devices, or auto"),
    BadInput("a plan of no questions", run("plan", "--questions 0"),
             line="--questions must be at least 1, got 0"),
    BadInput("a plan that keeps more than all", run("plan", "--kept_shares [2]"),
             line="--kept_shares must lie between 0 and 1, got 2"),
    BadInput("a plan for below a file", run("plan", "--out run.yaml/plan.json"),
             line="--out=run.yaml/plan.json: nothing can be written there: name another place"),
    BadInput("a plan with a bad cache", run("plan", "--cache.path bad.parquet"),
             make=with_value("token_ids", [5, -1, 7, 8]),
             line="bad.parquet, row 2 (question '66627f6029f5a4b8'): token id -1 is negative: build a new cache"),
    BadInput("an analysis of no prefixes", run("segments", "--model.points 0"),
             line="model.continuations must be at least 2 and model.points at least 1, got 8 and 0"),
    BadInput("a file for the folder of an analysis", run("segments", "--out run.yaml"),
             line="--out=run.yaml: a file has this name: name a folder"),
    BadInput("a run that there is not", "report nowhere",
             line="nowhere: holds no metrics.csv; name the folder of a run with a CSVLogger"),
    BadInput("metrics without a row", "report folder", files={"folder/metrics.csv": "step,reward/mean\n"},
             line="folder/metrics.csv: has no rows with a step: name the folder of a run that has trained"),
    BadInput("metrics of words", "report folder", files={"folder/metrics.csv": "step,reward/mean\n0,much\n"},
             line="folder/metrics.csv: its column 'reward/mean' holds something other than numbers: mend it"),
    BadInput("a summary that is no JSON", "report folder", files={**_METRICS, "folder/summary.json": "{"},
             line="folder/summary.json: not JSON that can be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): move the file away"),
    BadInput("completions that are no objects", "report folder",
             files={**_METRICS, "folder/completions.jsonl": "[1]\n"},
             line="folder/completions.jsonl: holds something other than JSON objects: move the file away"),
    BadInput("a response limit of none", run("test", "--data.test q.jsonl --model.max_response_tokens 0"),
             files={"q.jsonl": GOOD},
             line="model.max_response_tokens must be at least 1, got 0"),
]

IMPORTS = [
    BadInput("a missing table of responses", _IMPORT,
             line="rows.jsonl: no such file: check the path"),
    BadInput("a table of responses that is no JSON", _IMPORT, files={"rows.jsonl": "{\n"},
             line="rows.jsonl, line 1: malformed JSON (Expecting property name enclosed in double quotes): write one object a line"),
    _import("responses to other questions", question="9", response="a1",
            line="rows.jsonl: none of its rows is about one of the 8 training questions: rows need the question's uid or its exact text"),
    _import("no response",
            line="rows.jsonl, row 1: has neither 'response' nor token ids; name the column of the response with --response_column"),
    _import("a response that is an object with a path", response={"path": "file:///etc/passwd"},
            line="rows.jsonl, row 1: its 'response' is no text, but of type dict"),
    _import("responses that are all too long", response="a1" * 200,
            line="rows.jsonl: none of its rows is about one of the 8 training questions; 1 are, but over model.max_response_tokens: rows need the question's uid or its exact text"),
    _import("no right response", words="--only_correct true", response="a1",
            line="rows.jsonl: none of its 1 responses is right: check that model.verifier reads their answers, or drop --only_correct"),
    _import("a word for whether a response has ended", response="a1", finished="no",
            line="rows.jsonl, row 1: finished is 'no': it is true or false"),
    _import("imported token ids that are fractions", token_ids=[1.5, 2],
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
    _import("imported token ids that are negative", token_ids=[-1, 5],
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
    _import("imported token ids that are texts", token_ids=["a"],
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
    _import("an imported token id outside the vocabulary", token_ids=[48],
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
    _import("a number for token ids", token_ids=5,
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
    _import("token ids of another text", token_ids=[5, 6], response="a1",
            line="rows.jsonl, row 1: its token ids are not this tokenizer's (they do not decode to its 'response'); drop the column 'token_ids', and the text is tokenised"),
]
# fmt: on
