"""Rows become prompts; what cannot be used is told by file, row and remedy."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpo_lightning.core.errors import DataError
from rpo_lightning.data.gold_answers import gold_answer
from rpo_lightning.data.prompts import PromptBuilder
from rpo_lightning.data.sources import HubDataset, JsonLines, Parquet, Rows, as_source
from rpo_lightning.rewards import ExactMatchVerifier, MathVerifier
from tests.conftest import make_data, make_module, make_trainer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}#{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def build(rows, tokenizer, verifier=None, **settings):
    builder = PromptBuilder(
        tokenizer, verifier or ExactMatchVerifier(), settings.pop("max_prompt_tokens", 100), **settings
    )
    return builder.build(Rows(rows))


@pytest.mark.parametrize("question", ["problem", "question", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_usual_columns_are_found(tokenizer, question, answer):
    prompts, report = build([{question: "3a+4=", answer: "7", "other": 1}], tokenizer)
    assert (prompts[0].text, prompts[0].answer) == ("3a+4=", "7")
    assert prompts[0].token_ids == tuple(tokenizer("3a+4=")["input_ids"])
    assert report.kept == 1


def test_columns_can_be_named(tokenizer):
    rows = [{"q": "3a+4=", "gold": 7, "question": "no", "answer": "no", "id": 12}]
    prompts, _ = build(rows, tokenizer, question_column="q", answer_column="gold", uid_column="id")
    assert (prompts[0].text, prompts[0].answer, prompts[0].uid) == ("3a+4=", "7", "12")


def test_an_unknown_column_is_told_with_those_there_are(tokenizer):
    with pytest.raises(DataError, match=r"row 1: no column 'text' for the question; it has answer, question: set data"):
        build([{"question": "1", "answer": "1"}], tokenizer, question_column="text")


def test_gsm8k_answers_end_after_four_hashes():
    assert gold_answer("2+2 = <<2+2=4>>4\n#### 1,234") == "1234"
    assert gold_answer(" \\frac{1}{2} ") == "\\frac{1}{2}"


def test_uids_are_stable_and_equal_questions_are_kept_once(tokenizer):
    rows = [{"question": "1a+1=", "answer": "2"}, {"question": "1a+2=", "answer": "3"}]
    first, _ = build(rows, tokenizer)
    second, report = build([*reversed(rows), rows[0]], tokenizer)
    assert {p.uid for p in first} == {p.uid for p in second}
    assert report.duplicates == 1


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    rows = [{"question": "1a+1=", "answer": "2"}, {"question": "1" * 50, "answer": "2"}]
    prompts, report = build(rows, tokenizer, max_prompt_tokens=20)
    assert (len(prompts), report.overlong) == (1, 1)


def test_a_gold_answer_that_cannot_be_compared_drops_its_row_and_names_it(tokenizer):
    rows = [{"question": "1", "answer": "4"}, {"question": "2", "answer": "####"}]
    prompts, report = build(rows, tokenizer, MathVerifier())
    assert len(prompts) == 1
    assert "row 2" in report.unusable[0]


def test_nothing_usable_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no usable question"):
        build([{"question": "1" * 50, "answer": "2"}], tokenizer, max_prompt_tokens=20)


@pytest.fixture
def chat(tokenizer):
    """The tokenizer with a chat template, which writes the beginning of each role."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_chat_template_and_system_prompt(tokenizer, chat):
    prompts, _ = build([{"question": "3a+4=", "answer": "7"}], chat, system_prompt="1")
    assert chat.decode(prompts[0].token_ids, skip_special_tokens=True).endswith("1#u<unk>3a+4=#a") or len(
        prompts[0].token_ids
    ) == len(chat("s:1#u:3a+4=#a", add_special_tokens=False)["input_ids"])
    assert prompts[0].text == "3a+4="
    with pytest.raises(DataError, match="needs a chat template"):
        build([{"question": "3a+4=", "answer": "7"}], tokenizer, system_prompt="1")


def test_messages_are_a_prompt_too(tokenizer):
    prompts, _ = build([{"prompt": [{"role": "user", "content": "3a+4="}], "answer": "7"}], tokenizer)
    assert prompts[0].text == "3a+4="


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_conversations_that_end_alike_are_different_questions(chat):
    rows = [{"prompt": conversation(first, "1", "+1="), "answer": "2"} for first in ("1+1=", "2-1=")]
    prompts, report = build([*rows, rows[0]], chat)
    assert (len(prompts), report.duplicates) == (2, 1)
    assert [p.text for p in prompts] == ["+1=", "+1="]
    again, _ = build(rows, chat)
    assert [p.uid for p in again] == [p.uid for p in prompts]


def test_a_single_message_has_the_uid_of_its_text(chat):
    rows = [{"question": "3a+4=", "answer": "7"}]
    messages = [{"question": conversation("3a+4="), "answer": "7"}]
    uids = {build(data, chat, system_prompt="1")[0][0].uid for data in (rows, messages)}
    assert uids == {hashlib.blake2b(b"3a+4=\0" + b"7", digest_size=8).hexdigest()}


def test_the_system_prompt_is_for_conversations_without_one_of_their_own(chat):
    rows = [{"prompt": conversation("3a+4=", system=system), "answer": "7"} for system in (None, "5")]
    prompts, _ = build(rows, chat, system_prompt="1")
    expected = ["s:1#u:3a+4=#a", "s:5#u:3a+4=#a"]
    assert [p.token_ids for p in prompts] == [tuple(chat(t, add_special_tokens=False)["input_ids"]) for t in expected]


def test_a_conversation_needs_a_chat_template(tokenizer):
    with pytest.raises(DataError, match=r"row 1: a conversation of 3 messages needs a chat template"):
        build([{"prompt": conversation("1+1=", "2", "+1="), "answer": "3"}], tokenizer)


def test_json_lines_and_parquet_hold_the_same(tmp_path):
    rows = [{"question": "1a+1=", "answer": "2"}, {"question": "1a+2=", "answer": "3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, kind in (("a.jsonl", JsonLines), ("a.parquet", Parquet)):
        source = as_source(str(tmp_path / name), "train")
        assert isinstance(source, kind)
        assert list(source.rows()) == rows


def test_a_hugging_face_data_set_is_read_by_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"question": "1a+1=", "answer": "2"}\n')
    assert list(HubDataset(str(tmp_path), split="train").rows()) == [{"question": "1a+1=", "answer": "2"}]
    with pytest.raises(DataError, match="cannot be loaded"):
        list(HubDataset(str(tmp_path / "missing")).rows())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "1", "answer": "2"}\n{"question": \n', r"line 2: malformed JSON"),
        ("[1, 2]\n", r"line 1: expected a JSON object, found the beginning of an array: write one object a line"),
        (
            '\n[\n {"question": "1", "answer": "2"}\n]\n',
            r"line 2: expected a JSON object, found the beginning of an array",
        ),
        ('"1"\n', r"line 1: expected a JSON object, found str"),
        ("", r"no usable question"),
        ('{"question": "1", "answer": null}\n', r"row 1: dropped, its gold answer is empty"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, tokenizer, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"bad\.jsonl.*{message}"):
        PromptBuilder(tokenizer, ExactMatchVerifier(), 100).build(JsonLines(str(path)))


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"question": "1", "answer": "2"}\n{"question": "3", "answer": "4"}\n', encoding="utf-8-sig")
    assert [row["question"] for row in JsonLines(str(path)).rows()] == ["1", "3"]


def test_a_path_names_a_file_as_text_does(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"question": "{i}a+1=", "answer": "{i + 1}"}}\n' for i in range(4)))
    data = make_data(train=path)
    make_trainer(tmp_path, max_steps=1).fit(make_module(max_response_tokens=8), datamodule=data)
    assert len(data.prompts["train"]) == 4


@pytest.mark.parametrize("row", [{"question": "a\ud83d", "answer": "1"}, {"question": "a", "answer": "1\ud83d"}])
def test_text_that_is_no_unicode_is_told_by_its_row(tokenizer, row):
    with pytest.raises(DataError, match=r"row 2: .* lone surrogate"):
        build([{"question": "1a+1=", "answer": "2"}, row], tokenizer)


def test_missing_files_are_named(tmp_path):
    for name in ("missing.jsonl", "missing.parquet"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            list(as_source(str(tmp_path / name), "train").rows())


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
def test_every_gsm8k_answer_can_be_verified(tokenizer):
    builder = PromptBuilder(tokenizer, MathVerifier(), 10_000)
    prompts, report = builder.build(JsonLines(str(GSM8K)))
    assert len(prompts) == 1319
    assert report.unusable == []
    assert prompts[0].answer == "18"


def test_fewer_questions_than_a_batch_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"16 training questions on 1 rank\(s\) are fewer than data.batch_size=17"):
        make_trainer(tmp_path).fit(make_module(), datamodule=make_data(batch_size=17))


def test_characters_that_the_tokenizer_does_not_know_are_told(tmp_path, caplog):
    rows = [{"question": f"{i}a+1=", "answer": str(i + 1)} for i in range(4)] + [{"question": "5π+1=", "answer": "6"}]
    with caplog.at_level(logging.WARNING, logger="rpo_lightning"):
        data = make_data(train=rows)
        make_trainer(tmp_path, max_steps=1).fit(make_module(), datamodule=data)
    assert "1 questions have characters that the tokenizer does not know, such as '5π+1='" in caplog.text
    assert data.reports["train"].unknown == ["5π+1="]
    assert data.reports["val"].unknown == []


def test_dropped_rows_are_reported(tmp_path, caplog):
    rows = [{"question": f"{i}a+1=", "answer": str(i + 1)} for i in range(4)] + [{"question": "5", "answer": " "}]
    rows.append(rows[0])
    with caplog.at_level(logging.WARNING, logger="rpo_lightning"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(), datamodule=make_data(train=rows))
    assert "4 questions kept" in caplog.text
    assert "1 duplicates" in caplog.text
