"""Rewards see content tokens; only tokens that frame the text are left out."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rpo_lightning.core.types import Completion, Prompt, RolloutRequest
from rpo_lightning.policy.tokenizer import Continuations, decode
from rpo_lightning.rewards import ExactMatchVerifier, FormatReward, Grader, GradingPool
from rpo_lightning.rollout.groups import Scoring

THOUGHTS = ["<think>", "</think>", "<answer>", "</answer>"]
# Framing in the tokenizers of Qwen, Llama 3, Gemma, Mistral, DeepSeek, GLM, Command R, Granite and gpt-oss.
FRAMES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]",
    "[SYSTEM_PROMPT]", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<|user|>", "<|assistant|>",
    "<|system|>", "<|observation|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|start|>", "<|end|>", "<|return|>",
]  # fmt: skip
CONTENT = [
    *THOUGHTS,
    "<|begin_of_thought|>",
    "<|channel|>",
    "<|message|>",
    "[THINK]",
    "◁think▷",
    "<seed:think>",
    "<tool_call>",
]


@pytest.fixture
def with_specials(tokenizer):
    """A copy of the embedded tokenizer with more special tokens."""
    import copy

    def add(*texts):
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"additional_special_tokens": list(texts)})
        return made

    return add


def ids_of(tokenizer, *parts):
    found = []
    for part in parts:
        known = tokenizer.get_vocab().get(part)
        found += [known] if known is not None else tokenizer(part, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("content", CONTENT)
def test_special_tokens_that_are_content_stay(with_specials, content):
    tokenizer = with_specials(content)
    ids = ids_of(tokenizer, "12", content, "34")
    assert decode(tokenizer, ids) == f"12{content}34"


@pytest.mark.parametrize("frame", FRAMES)
def test_tokens_that_frame_a_text_go(with_specials, frame):
    tokenizer = with_specials(frame, *THOUGHTS)
    ids = ids_of(tokenizer, frame, "<think>", "1", frame, "</think>", "2", frame)
    assert decode(tokenizer, ids) == "<think>1</think>2"
    assert decode(with_specials(frame), ids_of(with_specials(frame), "1", frame, "2")) == "12"


def test_end_and_padding_go_whatever_they_are_called(with_specials):
    tokenizer = with_specials("<think>", "<finis>")
    tokenizer.eos_token = "<finis>"
    ids = [*ids_of(tokenizer, "<think>", "7", "<finis>"), tokenizer.pad_token_id]
    assert decode(tokenizer, ids) == "<think>7"


def test_a_tokenizer_without_such_tokens_decodes_as_transformers_does(tokenizer):
    ids = [*ids_of(tokenizer, "a49-1=48#48"), tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_format_reward_sees_tags_that_are_special_tokens(with_specials):
    tokenizer = with_specials(*THOUGHTS)
    written = ids_of(tokenizer, "<think>", "1+1", "</think>", "<answer>", "2#2", "</answer>")
    ids = (*written, tokenizer.eos_token_id)
    request = RolloutRequest(Prompt("q", "1+1=", (5, 6), "2"), max_new_tokens=32)
    grader = Grader(ExactMatchVerifier(), [FormatReward()], GradingPool())
    scoring = Scoring(grader, tokenizer, [request], step=0)
    (group,) = scoring.groups([[Completion(ids, (0.0,) * len(ids), True)] * 2])
    assert group.samples[0].response == "<think>1+1</think><answer>2#2</answer>"
    assert group.reward_terms["format"] == [1.0, 1.0]


@pytest.fixture
def of_bytes():
    """A tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def test_continuations_of_a_prefix_read_as_whole_responses_do_wherever_it_was_cut(of_bytes, tokenizer):
    for of, text in ((of_bytes, "<think> Länge: 3 € 😀 <|im_end|> \n x̂"), (tokenizer, "a49-1=48#48")):
        ids = tuple(of(text)["input_ids"])
        for cut in range(len(ids)):
            texts = Continuations(of, ids[:cut])
            for suffix in (ids[cut:], ids[cut : cut + 1], ()):
                assert texts.text(suffix) == decode(of, ids[:cut] + suffix), cut


def test_a_prefix_is_decoded_once_for_its_group(of_bytes, monkeypatch):
    ids, decoded = tuple(of_bytes("a prefix and its end")["input_ids"]), []
    monkeypatch.setattr(of_bytes, "decode", lambda ids, **_: decoded.append(len(ids)) or "")
    texts = Continuations(of_bytes, ids[:8])
    for _ in range(3):
        texts.text(ids[8:])
    assert decoded == [8, len(ids) - 8, len(ids) - 8, len(ids) - 8]
