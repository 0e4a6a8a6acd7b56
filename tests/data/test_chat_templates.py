"""Chat templates as models need them: variables, thoughts that the prompt opens, templates from a file, examples."""

from __future__ import annotations

import copy
import json
import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rpo_lightning import RPODataModule
from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh
from rpo_lightning.callbacks import CompletionsCallback
from rpo_lightning.cli.cache.exchange import import_responses
from rpo_lightning.core.errors import ConfigurationError, DataError
from rpo_lightning.core.types import Completion
from rpo_lightning.data.prompt_format import few_shot_messages
from rpo_lightning.data.prompts import PromptBuilder
from rpo_lightning.data.sources import Rows
from rpo_lightning.policy.tokenizer import decode
from rpo_lightning.rewards import AccuracyReward, FormatReward, MathVerifier
from rpo_lightning.rollout import TransformersEngine
from tests.conftest import make_module, make_trainer

TURNS = (
    "{%- for m in messages %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}"
    "{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{%- endfor %}"
)
ASSISTANT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
# Qwen3: the policy opens its thoughts, or the prompt leaves them empty.
QWEN3 = (
    TURNS + ASSISTANT + "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# Qwen3-Thinking-2507, QwQ, DeepSeek-R1: the prompt opens them.
THINKING = TURNS + ASSISTANT + "{{- '<think>\\n' }}{%- endif %}"
QUESTION = "<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n"
ROWS = [{"question": "2+5?", "answer": "7"}]


@pytest.fixture
def chat():
    """A tokenizer of characters whose turn markers are tokens of their own."""
    words = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = QWEN3
    return made


def built(tokenizer, rows=ROWS, **settings):
    (prompt,), _ = PromptBuilder(tokenizer, MathVerifier(), 500, **settings).build(Rows(rows))
    return tokenizer.decode(prompt.token_ids), prompt.opening


@pytest.mark.parametrize(
    ("template", "variables", "end"),
    [
        (QWEN3, None, ""),
        (QWEN3, {"enable_thinking": True}, ""),
        (QWEN3, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (THINKING, None, "<think>\n"),
        (TURNS + ASSISTANT + "{{- '</think>' }}{%- endif %}", None, "</think>"),  # DeepSeek-V3.1 without thoughts
    ],
    ids=["thinking by default", "thinking", "not thinking", "opened", "closed only"],
)
def test_what_the_prompt_says_of_the_thoughts_belongs_to_the_response(chat, template, variables, end):
    chat.chat_template = template
    text, opening = built(chat, chat_template_kwargs=variables)
    assert text == QUESTION + end
    assert opening == ("<think></think>" if end == "</think>" else end)


def test_a_plain_prompt_may_open_the_thoughts_too_and_naming_the_tag_does_not(chat):
    chat.chat_template = None
    assert built(chat, [{"question": "Q: 2+5? A: <think>", "answer": "7"}])[1] == "<think>"
    assert built(chat, [{"question": "Begin with <think>. Q: 2+5?", "answer": "7"}])[1] == ""


def test_a_continued_message_is_continued_within_its_thought(chat):
    rows = [{"prompt": [*user("2+5?"), {"role": "assistant", "content": "Well. <think>2 and"}], "answer": "7"}]
    assert built(chat, rows, continue_final_message=True)[1] == "<think>2 and"


def user(text):
    return [{"role": "user", "content": text}]


class Speaking(TransformersEngine):
    """Says the same to every question. A policy that knows nothing finds all tokens equally likely."""

    says = ""

    def attach(self, policy, tokenizer, setup=None):
        self.tokenizer = tokenizer

    def generate(self, requests, sampling, seed, on_finished=None):
        ids = tuple(self.tokenizer(self.says + "<|im_end|>")["input_ids"])
        return [
            [Completion(ids, (-math.log(len(self.tokenizer)),) * len(ids), True)] * request.n for request in requests
        ]


def tiny_policy(tokenizer):
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def run(folder, tokenizer, says, **data):
    """The samples, and the format rewards, of an iteration in which the policy says something."""
    engine = Speaking()
    engine.says = says
    module = make_module(
        policy=tiny_policy(tokenizer), tokenizer=tokenizer, engine=engine, verifier=MathVerifier(),
        rewards=[AccuracyReward(), FormatReward()], group_size=2,
    )  # fmt: skip
    trainer = make_trainer(folder, max_steps=1, callbacks=[CompletionsCallback()])
    trainer.fit(module, datamodule=RPODataModule(train=ROWS, batch_size=1, **data))
    (group,) = module.groups
    return group.samples[0], group.reward_terms["format"][0]


ANSWER = "<answer>7</answer>"
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("template", "variables", "says", "correct", "has_format"),
    [
        (QWEN3, None, "<think>\nSo 7.\n</think>\n\n" + ANSWER, 1, 1),
        (QWEN3, None, "So 7.\n</think>\n\n" + ANSWER, 1, 0),  # nobody has opened the thoughts
        (QWEN3, None, "<think>\nSo \\boxed{7}", 0, 0),
        (QWEN3, OFF, ANSWER, 1, 1),
        (QWEN3, OFF, "It is \\boxed{7}.", 1, 0),
        (QWEN3, OFF, "<think>\nSo \\boxed{7}", 0, 0),
        (THINKING, None, "So 7.\n</think>\n\n" + ANSWER, 1, 1),
        (THINKING, None, "<think>\nSo 7.\n</think>\n\n" + ANSWER, 1, 0),  # opened twice
        (THINKING, None, "I guess \\boxed{7} but", 0, 0),  # still in thoughts
        (THINKING, None, "I guess \\boxed{6} but\n</think>\nit is \\boxed{7}", 1, 0),
    ],
)
def test_graders_read_a_response_that_begins_in_the_prompt(
    tmp_path, chat, template, variables, says, correct, has_format
):
    chat.chat_template = template
    sample, form = run(tmp_path, chat, says, chat_template_kwargs=variables)
    assert (sample.correct, form) == (correct, has_format)
    assert sample.length == len(says.replace("<|im_end|>", "")) + 1  # the opening is the prompt's, not the policy's


def test_completions_show_what_graders_read(tmp_path, chat):
    chat.chat_template = THINKING
    run(tmp_path, chat, "7</think>")
    row = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert (row["prefix"], row["suffix"]) == ("<think>\n", "7</think>")


@pytest.mark.parametrize(
    "trace", ["<think>\n2 and 5.\n</think>\n\n7", "<think>2 and 5.\n</think>\n\n7", "2 and 5.\n</think>\n\n7"]
)
def test_imported_traces_do_not_open_the_thoughts_again(chat, trace):
    chat.chat_template = THINKING
    module = make_module(policy=tiny_policy(chat), tokenizer=chat, verifier=MathVerifier())
    prompts, _ = PromptBuilder(chat, MathVerifier(), 500).build(Rows(ROWS))
    cache = ExperienceCache("any")
    rows = [{"question": "2+5?", "response": trace}]
    report = import_responses(
        cache, prompts, rows, (["question"], "response"), chat, module.grader, 100, "rows", EpsilonGreedyRefresh()
    )
    module.release()
    assert report.right == 1
    (entry,) = cache
    assert decode(chat, entry.response.token_ids.tolist()) == "2 and 5.\n</think>\n\n7"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", r"chat_template_kwargs\.enable_thinkin: .* does not read it"),
        ("add_generation_prompt", r"chat_template_kwargs\.add_generation_prompt is no variable .* leave it out"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(chat, name, message):
    with pytest.raises(DataError, match=message):
        built(chat, chat_template_kwargs={name: False})


@pytest.mark.parametrize(
    ("template", "is_read"),
    [
        ("{% set enable_thinking = enable_thinking | default(true) %}{{ enable_thinking }}" + TURNS, True),
        ("{# enable_thinking is an option #}" + TURNS, False),
        ("{{ 'enable_thinking' }}" + TURNS, False),
        ("{% set enable_thinking = true %}{{ enable_thinking }}" + TURNS, False),
        (TURNS + "{% generation %}{{ enable_thinking }}{% endgeneration %}", True),  # a tag of transformers
    ],
)
def test_a_template_that_only_mentions_a_variable_does_not_read_it(chat, template, is_read):
    chat.chat_template = template
    if is_read:
        assert "False" in built(chat, chat_template_kwargs=OFF)[0]
    else:
        with pytest.raises(DataError, match=r"chat_template_kwargs\.enable_thinking: .* does not read it"):
            built(chat, chat_template_kwargs=OFF)


LAST = "{{ messages[-1].content }}"
FEW = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("template", "settings", "left_out"),
    [
        (LAST, {"system_prompt": "Think."}, r"data\.system_prompt"),
        (LAST, {"few_shot": FEW}, r"data\.few_shot"),
        ("{{ messages[0].content }}", {"few_shot": FEW}, "the question"),
        ("constant", {}, "the question"),
    ],
)
def test_a_template_that_leaves_a_setting_or_the_question_out_is_refused(chat, template, settings, left_out):
    chat.chat_template = template
    with pytest.raises(DataError, match=f"row 1: the tokenizer's chat template leaves {left_out} out of the prompt"):
        built(chat, **settings)


def test_a_system_prompt_that_the_template_has_by_itself_may_be_given(chat):
    # Qwen2.5's templates have one.
    chat.chat_template = (
        "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nThink.<|im_end|>\n' }}{%- endif %}" + TURNS
    )
    assert built(chat, system_prompt="Think.") == built(chat)


def test_a_system_message_of_the_row_is_no_sign_that_the_prompt_has_no_effect(chat):
    chat.chat_template = TURNS
    rows = [{"messages": [{"role": "system", "content": "Own."}, *user("1?")], "answer": "1"}, *ROWS]
    prompts, _ = PromptBuilder(chat, MathVerifier(), 500, system_prompt="Think.", question_column=None).build(
        Rows([{"question": row.get("messages") or row["question"], "answer": row["answer"]} for row in rows])
    )
    assert ["Think." in chat.decode(prompt.token_ids) for prompt in prompts] == [False, True]


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("{{ messages[0].content + 3 }}", {}, r"fails \(TypeError: can only concatenate"),
        ("{{ 1 / 0 }}", {}, r"fails \(ZeroDivisionError"),
        ("{{ raise_exception('') }}", {}, r"refuses it \(TemplateError\)"),
        ({"a": TURNS, "b": TURNS}, {}, r"fails \(ValueError: This model has multiple chat templates"),
        ({"a": TURNS, "b": TURNS}, {"chat_template_kwargs": OFF}, r"fails \(ValueError: This model has multiple"),
        (TURNS, {"chat_template_kwargs": {"messages": []}}, r"chat_template_kwargs\.messages is no variable"),
    ],
)
def test_what_a_template_raises_is_told_in_a_line(chat, template, settings, message):
    chat.chat_template = template
    with pytest.raises(DataError, match=message):
        built(chat, **settings)


def test_a_template_that_changes_the_message_to_be_continued_is_told_in_a_line(chat):
    chat.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    rows = [{"messages": [*user("2+5?"), {"role": "assistant", "content": "it is"}], "answer": "7"}]
    with pytest.raises(DataError, match=r"fails \(ValueError: continue_final_message is set but"):
        built(chat, rows, continue_final_message=True)


def test_a_conversation_whose_last_message_is_empty_is_left_out(chat):
    prompts, report = PromptBuilder(chat, MathVerifier(), 500).build(
        Rows([*ROWS, {"question": user("  "), "answer": "7"}])
    )
    assert len(prompts) == 1
    assert "row 2: dropped, the last message of its conversation is empty" in report.unusable[0]


@pytest.mark.parametrize("setting", [{"chat_template_kwargs": OFF}, {"few_shot": user("1+1?")}])
def test_settings_of_templates_need_one(chat, setting):
    chat.chat_template = None
    with pytest.raises(DataError, match=rf"data\.{next(iter(setting))} needs a chat template.*data\.chat_template"):
        built(chat, **setting)


# -- a template from a file -----------------------------------------------------------------------


def test_a_base_model_gets_its_template_from_a_file_and_keeps_it_in_exports(tmp_path, chat):
    base = copy.deepcopy(chat)
    base.chat_template = None
    (tmp_path / "base.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} Thoughts: <think>")
    module = make_module(policy=tiny_policy(base), tokenizer=base, verifier=MathVerifier(), engine=Speaking())
    data = RPODataModule(train=ROWS, batch_size=1, chat_template=str(tmp_path / "base.jinja"), system_prompt="Think. ")
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    (prompt,) = data.prompts["train"]
    assert base.decode(prompt.token_ids) == "Think. 2+5? Thoughts: <think>"
    assert prompt.opening == "<think>"
    module.save_pretrained(tmp_path / "policy")
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "policy")
    assert exported.apply_chat_template(user("1?"), tokenize=False) == "1? Thoughts: <think>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"missing\.jinja: cannot be read"),
        (" \n", r"missing\.jinja: the file is empty"),
        ("\n{% for %}", r"is no Jinja: .* in line 2"),
    ],
)
def test_a_template_file_that_cannot_be_used_is_told(tmp_path, chat, content, message):
    if content is not None:
        (tmp_path / "missing.jinja").write_text(content)
    data = RPODataModule(train=ROWS, chat_template=str(tmp_path / "missing.jinja"))
    with pytest.raises(DataError, match=message):
        data.read("train", "", chat, MathVerifier())


def test_a_template_that_is_not_used_is_refused():
    with pytest.raises(ConfigurationError, match=r"data\.chat_template is not used with data\.use_chat_template"):
        RPODataModule(train=ROWS, chat_template="base.jinja", use_chat_template=False)


# -- examples -------------------------------------------------------------------------------------

EXAMPLES = [{"question": "1+1?", "answer": "1 and 1. #### 2"}, {"question": "3+1?", "answer": "#### 4"}]
SHOWN = "".join(
    f"<|im_start|>user\n{e['question']}<|im_end|>\n<|im_start|>assistant\n{e['answer']}<|im_end|>\n" for e in EXAMPLES
)
SYSTEM = "<|im_start|>system\nAdd.<|im_end|>\n"


@pytest.mark.parametrize("in_a_file", [False, True])
def test_examples_stand_between_system_prompt_and_question_word_for_word(tmp_path, chat, in_a_file):
    shots = tmp_path / "shots.jsonl"
    shots.write_text("\n".join(map(json.dumps, EXAMPLES)))
    data = RPODataModule(train=ROWS, system_prompt="Add.", few_shot=str(shots) if in_a_file else EXAMPLES)
    (prompt,) = data.read("train", "", chat, MathVerifier())
    assert chat.decode(prompt.token_ids) == SYSTEM + SHOWN + QUESTION
    without = RPODataModule(train=ROWS).read("train", "", chat, MathVerifier())
    assert (prompt.text, prompt.uid) == ("2+5?", without[0].uid)  # a cache made without examples fits


def test_a_conversation_keeps_its_own_system_message_before_the_examples(chat):
    rows = [{"prompt": [{"role": "system", "content": "Add."}, *user("2+5?")], "answer": "7"}]
    assert built(chat, rows, system_prompt="No.", few_shot=few_shot_messages(Rows(EXAMPLES)))[0] == (
        SYSTEM + SHOWN + QUESTION
    )


@pytest.mark.parametrize("broken", [{"question": "1+1?"}, {"question": "1+1?", "answer": [2]}, {"answer": "2"}])
def test_an_example_without_a_text_is_told(chat, broken):
    with pytest.raises(DataError, match=r"data\.few_shot: 2 rows in memory, row 2 has no text '(answer|question)'"):
        RPODataModule(train=ROWS, few_shot=[EXAMPLES[0], broken]).read("train", "", chat, MathVerifier())
