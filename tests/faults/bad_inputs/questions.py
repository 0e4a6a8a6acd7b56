"""Bad questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.bad_inputs.case import BadInput, run

_LINES = run("fit", "--data.train bad.jsonl")
_TABLE = run("fit", "--data.train bad.parquet")
GOOD = '{"question": "1a+1=", "answer": "2"}\n'


def _lines(what: str, content: str | bytes, *words: str, line: str) -> BadInput:
    return BadInput(what, " ".join([_LINES, *words]), line, {"bad.jsonl": content})


def _table(what: str, *, line: str, **columns: Any) -> BadInput:
    return BadInput(what, _TABLE, line, make=lambda: pq.write_table(pa.table(columns), "bad.parquet"))


def _overwritten(first: int, last: int | None) -> Callable[[], None]:
    """A Parquet file of which some bytes are lost."""

    def make() -> None:
        numbers = list(map(str, range(5000)))
        pq.write_table(pa.table({"question": numbers, "answer": numbers}), "bad.parquet")
        content = bytearray(Path("bad.parquet").read_bytes())
        content[first:last] = bytes(last - first) if last is not None else b""
        Path("bad.parquet").write_bytes(content)

    return make


# fmt: off
FILES = [
    BadInput("a missing file", _LINES,
             line="bad.jsonl: no such file: check the path"),
    BadInput("a folder for a file", _LINES, files={"bad.jsonl/part": ""},
             line="bad.jsonl: a folder: name a file in it"),
    BadInput("a file of another kind", run("fit", "--data.train bad.csv"), files={"bad.csv": "question,answer\n"},
             line="bad.csv: questions are read from .jsonl, .json and .parquet files"),
    BadInput("a folder without data", run("fit", "--data.train ./folder"), files={"folder/notes.md": ""},
             line="data set ./folder:train cannot be loaded (…): check its name, or give a .jsonl or .parquet file"),
    BadInput("a data set that cannot be reached", run("fit", "--data.train nobody/nothing"),
             line="data set nobody/nothing:train cannot be loaded (…): check its name, or give a .jsonl or .parquet file"),
    BadInput("training without questions", "fit --config bad.yaml",
             files={"bad.yaml": "model: {policy: 'embedded:arithmetic-reasoner', rewards: [AccuracyReward]}\n"
                                "trainer: {logger: false, accelerator: cpu}\n"},
             line="data.train is not set: give it a file, a data set name or a data source"),
    BadInput("validation without questions", run("validate"),
             line="data.val is not set: give it a file, a data set name or a data source"),
    BadInput("a test without questions", run("test"),
             line="data.test is not set: give it a file, a data set name or a data source"),
    BadInput("one of several sets is missing", run("validate", """--data.val '{"one": "a.jsonl", "two": "b.jsonl"}'"""),
             files={"a.jsonl": GOOD},
             line="b.jsonl: no such file: check the path"),
    _lines("an empty file", "",
           line="bad.jsonl: no usable question in it: it has no rows"),
    _lines("fewer questions than a batch", GOOD,
           line="data.train: 1 training questions on 1 rank(s) are fewer than data.batch_size=4: set it to 1 or less"),
    _lines("one question many times", GOOD * 5,
           line="data.train: 1 training questions on 1 rank(s) are fewer than data.batch_size=4: set it to 1 or less"),
    _lines("prompts that are too long", GOOD, "--data.max_prompt_tokens 2",
           line="bad.jsonl: no usable question in it (1 over data.max_prompt_tokens=2, 0 without a usable question or gold answer)"),
    _lines("a file that is not UTF-8", '{"question": "é", "answer": "2"}\n'.encode("latin-1"),
           line="bad.jsonl, line 1: not UTF-8 (invalid continuation byte): save the file in UTF-8"),
    _lines("a compressed file", b"\x1f\x8b\x08\x00rest",
           line="bad.jsonl, line 1: not UTF-8 (invalid start byte): save the file in UTF-8"),
    _lines("a line that is no JSON", GOOD + '{"question"\n',
           line="bad.jsonl, line 2: malformed JSON (Expecting ':' delimiter): write one object a line"),
    _lines("an array of rows", "[" + GOOD.strip() + "]\n",
           line="bad.jsonl, line 1: expected a JSON object, found the beginning of an array: write one object a line, as jq -c '.[]' does"),
    _lines("an object over several lines", '{\n  "question": "1a+1=",\n  "answer": "2"\n}\n',
           line="bad.jsonl, line 1: malformed JSON (Expecting property name enclosed in double quotes): write one object a line"),
    _lines("a line that is a number", "3\n",
           line="bad.jsonl, line 1: expected a JSON object, found int: write one object a line"),
    _lines("a line that is nested without end", '{"question": ' + "[" * 100_000 + "\n",
           line="bad.jsonl, line 1: nested too deeply: mend the line or leave it out"),
    _lines("a number of thousands of digits", '{"question": "1a+1=", "answer": ' + "9" * 5000 + "}\n",
           line="bad.jsonl, line 1: a number of too many digits: mend the line or leave it out"),
    BadInput("a file that is no Parquet", _TABLE, files={"bad.parquet": GOOD},
             line="bad.parquet: not a readable Parquet file (…): copy or write it again"),
    BadInput("a torn Parquet file", _TABLE, make=_overwritten(-40, None),
             line="bad.parquet: not a readable Parquet file (…): copy or write it again"),
    BadInput("a Parquet file with lost bytes", _TABLE, make=_overwritten(2000, 9000),
             line="bad.parquet: not a readable Parquet file (…): copy or write it again"),
    _table("a Parquet file without rows", question=pa.array([], pa.string()), answer=pa.array([], pa.string()),
           line="bad.parquet: no usable question in it: it has no rows"),
]

ROWS = [
    _lines("no column of questions", '{"text": "1a+1=", "answer": "2"}\n',
           line="bad.jsonl, row 1: no column 'problem' or 'question' or 'prompt' or 'messages' or 'conversations' for the question; it has answer, text: set data.question_column"),
    _lines("no column of answers", '{"question": "1a+1="}\n',
           line="bad.jsonl, row 1: no column 'answer' or 'final_answer' or 'solution' or 'reward_model.ground_truth' for the answer; it has question: set data.answer_column"),
    _lines("a later row without an answer", GOOD + '{"question": "2a+1="}\n',
           line="bad.jsonl, row 2: no column 'answer' or 'final_answer' or 'solution' or 'reward_model.ground_truth' for the answer; it has question: set data.answer_column"),
    _lines("a named column that there is not", GOOD, "--data.question_column text",
           line="bad.jsonl, row 1: no column 'text' for the question; it has answer, question: set data.question_column"),
    _lines("an identifier that there is not", GOOD, "--data.uid_column id",
           line="bad.jsonl, row 1: no value in the uid column 'id'"),
    _lines("a question that is null", '{"question": null, "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its question is empty"),
    _lines("a question that is empty", '{"question": " ", "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its question is empty"),
    _lines("a question that is an object with a path", '{"question": {"path": "file:///etc/passwd"}, "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its question is no text and no conversation, but of type dict"),
    _lines("a question that is true", '{"question": true, "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its question is no text and no conversation, but of type bool"),
    _lines("a message without a role", '{"messages": [{"content": "1a+1="}], "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its conversation has a message with the keys content: messages need role and content, or from and value"),
    _lines("a message with an image",
           '{"messages": [{"role": "user", "content": [{"type": "image", "url": "file:///x"}]}], "answer": "2"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its conversation has a part of type image: policies read text only"),
    _lines("a conversation without a chat template",
           '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "answer": "2"}\n',
           line="bad.jsonl, row 1: a conversation of 2 messages needs a chat template, and the tokenizer has none (or it is turned off)"),
    _lines("a system prompt without a chat template", GOOD, "--data.system_prompt Calculate",
           line="data.system_prompt needs a chat template, and the tokenizer has none (or it is turned off): name a Jinja file with data.chat_template"),
    _lines("a chat template that there is not", GOOD, "--data.use_chat_template true",
           line="data.use_chat_template is true, but the tokenizer has no chat template"),
    _lines("an answer that is null", '{"question": "1a+1=", "answer": null}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its gold answer is empty"),
    _lines("an answer that is NaN", '{"question": "1a+1=", "answer": NaN}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its gold answer is empty"),
    _lines("an answer that is infinite", '{"question": "1a+1=", "answer": Infinity}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its gold answer is inf"),
    _lines("an answer that is an object", '{"question": "1a+1=", "answer": {"value": 2}}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its gold answer is an object with the keys value: name one of them, as in data.answer_column=reward_model.ground_truth"),
    _lines("an answer of lists", '{"question": "1a+1=", "answer": [[1], [2]]}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its gold answer is of type list: give a text or a number"),
    _lines("a tolerance that is none", '{"question": "1a+1=", "final_answer": "2", "error": "some"}\n',
           line="bad.jsonl: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.jsonl, row 1: dropped, its error 'some' is no tolerance"),
    _lines("half a character", '{"question": "\\ud800", "answer": "2"}\n',
           line="bad.jsonl, row 1: a lone surrogate, which is half a character, in question or gold answer: remove it"),
    _table("an answer of bytes", question=["1a+1="], answer=[b"2"],
           line="bad.parquet: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.parquet, row 1: dropped, its gold answer is of type bytes: give a text or a number"),
    _table("a column of images", question=[{"bytes": None, "path": "/etc/passwd"}], answer=["2"],
           line="bad.parquet: no usable question in it (0 over data.max_prompt_tokens=1024, 1 without a usable question or gold answer); bad.parquet, row 1: dropped, its question is no text and no conversation, but of type dict"),
]
# fmt: on
