"""Rows in the shapes that data sets are published in: verl's, ShareGPT's, content parts, answered conversations."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from rpo_lightning.core.errors import DataError
from rpo_lightning.data.prompts import PromptBuilder
from rpo_lightning.data.sources import Rows
from rpo_lightning.rewards import ExactMatchVerifier

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ENDS = CHATML.replace("<assistant>", "{{ eos_token }}")


@pytest.fixture
def chat_tokenizer(tokenizer):
    """A tokenizer of characters with a chat template; it is the test's own to change."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = CHATML
    return made


def build(tokenizer, rows, **settings):
    return PromptBuilder(tokenizer, ExactMatchVerifier(), 500, **settings).build(Rows(rows))


def rendered(tokenizer, rows, **settings):
    (prompt,), _ = build(tokenizer, rows, **settings)
    return tokenizer.decode(prompt.token_ids).replace(" ", ""), prompt


VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "20+3?"}],
    "reward_model": {"ground_truth": "23", "style": "rule"},
    "extra_info": {"index": "7"},
}


def test_verls_rows_are_read_as_they_are(chat_tokenizer):
    text, prompt = rendered(chat_tokenizer, [VERL])
    assert (text, prompt.answer, prompt.text) == ("<user>20+3?</user><assistant>", "23", "20+3?")


def test_a_nested_column_is_named_with_a_dot(chat_tokenizer):
    row = {"question": "1+1?", "meta": {"gold": {"value": 2}, "id": "a"}}
    _, prompt = rendered(chat_tokenizer, [row], answer_column="meta.gold.value", uid_column="meta.id")
    assert (prompt.answer, prompt.uid) == ("2", "a")
    with pytest.raises(DataError, match=r"no column 'meta\.gold\.x' for the answer"):
        build(chat_tokenizer, [row], answer_column="meta.gold.x")


def test_a_column_whose_name_has_a_dot_is_found_first(chat_tokenizer):
    row = {"question": "1+1?", "a.b": "2", "a": {"b": "3"}}
    assert rendered(chat_tokenizer, [row], answer_column="a.b")[1].answer == "2"


def test_an_object_is_never_a_gold_answer(chat_tokenizer):
    with pytest.raises(DataError, match=r"an object with the keys ground_truth, style: name one of them"):
        build(chat_tokenizer, [VERL], answer_column="reward_model")


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpts_conversations_are_read(chat_tokenizer, column):
    row = {column: [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+5?"}], "answer": "7"}
    text, prompt = rendered(chat_tokenizer, [row])
    assert text == "<system>Bebrief.</system><user>2+5?</user><assistant>"
    assert prompt.text == "2+5?"


def test_a_conversation_written_as_json_is_a_conversation_and_other_text_is_text(chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+5?"}]
    (written, as_list), _ = build(
        chat_tokenizer, [{"messages": json.dumps(messages), "answer": "7"}, {"messages": messages, "answer": "8"}]
    )
    assert written.token_ids == as_list.token_ids
    for text in ("[2+5?", "[1, 2]", "[]", '[{"a": 1}]', '[{"from": 1, "to": 2}]', "[" * 100_000):
        builder = PromptBuilder(chat_tokenizer, ExactMatchVerifier(), max_prompt_tokens=10**6)
        (prompt,), _ = builder.build(Rows([{"messages": text, "answer": "7"}]))
        assert prompt.text == text


def test_content_parts_are_joined_and_other_parts_are_told(chat_tokenizer):
    parts = [{"type": "text", "text": "2+"}, "5?"]
    assert rendered(chat_tokenizer, [{"prompt": [{"role": "user", "content": parts}], "answer": "7"}])[1].text == "2+5?"
    image = {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "answer": "7"}
    _, report = build(chat_tokenizer, [image, VERL])
    assert report.unusable == [
        "2 rows in memory, row 1: dropped, its conversation has a part of type image_url: policies read text only"
    ]


def test_a_message_without_role_or_content_drops_its_row(chat_tokenizer):
    for broken in ({"speaker": "x"}, {"role": "user", "content": None}, "hello"):
        _, report = build(chat_tokenizer, [{"prompt": [broken], "answer": "7"}, VERL])
        assert len(report.unusable) == 1
        assert "its conversation has a message" in report.unusable[0]


ANSWERED = {
    "conversations": [{"from": "human", "value": "2+5?"}, {"from": "gpt", "value": "Let me see: 2"}],
    "answer": "7",
}


def test_a_conversation_that_ends_with_the_assistant_is_refused_or_continued(chat_tokenizer):
    _, report = build(chat_tokenizer, [ANSWERED, VERL])
    assert "set data.continue_final_message=true" in report.unusable[0]
    text, prompt = rendered(chat_tokenizer, [ANSWERED], continue_final_message=True)
    assert text == "<user>2+5?</user><assistant>Letmesee:2"
    assert prompt.text == "2+5?"
    # A conversation that ends with the user gets its generation prompt as ever.
    assert rendered(chat_tokenizer, [VERL], continue_final_message=True)[0].endswith("<assistant>")


def test_a_template_that_refuses_a_system_message_is_one_line(chat_tokenizer):
    chat_tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(DataError, match=r"refuses it \(System role not supported\): leave out data\.system_prompt"):
        build(chat_tokenizer, [VERL], system_prompt="Think.")
    assert rendered(chat_tokenizer, [VERL])[0] == "<user>20+3?</user><assistant>"


def test_a_template_that_ends_a_prompt_with_eos_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = ENDS
    with pytest.raises(DataError, match="ends the prompt with the end-of-sequence token '<eos>'"):
        build(chat_tokenizer, [VERL])


def test_an_eos_that_a_tokenizer_appends_to_plain_text_is_left_out(chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.chat_template = None
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    assert chat_tokenizer("2")["input_ids"][-1] == 1
    _, prompt = rendered(chat_tokenizer, [{"question": "2+5?", "answer": "7"}])
    assert prompt.token_ids[-1] == chat_tokenizer.convert_tokens_to_ids("?")


def test_every_row_that_was_left_out_has_its_reason(chat_tokenizer):
    rows = [VERL, ANSWERED, {"prompt": "1?", "answer": json.loads('{"a": 1}')}, {"prompt": "", "answer": "1"}]
    _, report = build(chat_tokenizer, rows)
    assert report.kept == 1
    assert [m.split(": dropped, ")[0].split(", ")[1] for m in report.unusable] == ["row 2", "row 3", "row 4"]
