"""Make the embedded reasoner: ``python -m rpo_lightning.tasks.make_reasoner``.

A Llama of 337k parameters is taught correct chains of 3, then 8, then 20 operations, and is stopped
as soon as it solves about a third of fresh 20-step problems at temperature 1: good enough for a
reward signal, bad enough to leave something to learn. The result, weights and tokenizer in the
ordinary Hugging Face files, is what ships in ``rpo_lightning/tasks/arithmetic_reasoner``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rpo_lightning.engines.base import GenerationRequest, Sampling
from rpo_lightning.engines.transformers_engine import TransformersEngine
from rpo_lightning.rollouts import decode
from rpo_lightning.tasks.arithmetic import STEP_NAMES, draw_problem

CHARACTERS = "0123456789" + STEP_NAMES + "+-*=#"
# (operations, updates): the last stage ends by accuracy.
CURRICULUM = ((3, 200), (8, 200), (20, 2000))
BATCH_SIZE = 64
REPEAT_SHARE = 0.15
EVALUATION_PROBLEMS = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; ``^`` opens a prompt and ``$`` ends a response."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "^", "$", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", vocabulary["^"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="^", eos_token="$", pad_token="<pad>", unk_token="<unk>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def training_batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, operations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids and labels (prompts masked), both [B, T]."""
    rows, labels = [], []
    for _ in range(BATCH_SIZE):
        problem = draw_problem(rng, operations)
        prompt = tokenizer(problem.question)["input_ids"]
        solution = problem.solution(list(rng.random(operations) < REPEAT_SHARE))
        response = tokenizer(solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=-100),
    )


def sampled_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, operations: int, seed: int) -> float:
    """Share of fresh problems solved by one sample at temperature 1."""
    rng = np.random.default_rng(seed)
    problems = [draw_problem(rng, operations) for _ in range(EVALUATION_PROBLEMS)]
    engine = TransformersEngine(max_sequences=256)
    engine.attach(model, tokenizer)
    engine.load_weights(model, version=0)
    requests = [GenerationRequest(tuple(tokenizer(p.question)["input_ids"]), 1, 320) for p in problems]
    outputs = engine.generate(requests, Sampling(), seed=seed)
    texts = [decode(tokenizer, c[0].token_ids) for c in outputs]
    right = [t.rpartition("#")[2] == str(p.answer) for t, p in zip(texts, problems, strict=True)]
    return float(np.mean(right))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "arithmetic_reasoner")
    parser.add_argument("--accuracy", type=float, default=0.30, help="stop at this sampled accuracy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    start = time.monotonic()
    update = 0
    for operations, updates in CURRICULUM:
        for stage_update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (update + 1) / 50)
            input_ids, labels = training_batch(rng, tokenizer, operations)
            loss = model(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update += 1
            if operations == 20 and stage_update % 20 == 19:
                # Seeds beyond those of the shipped data sets, so that nothing evaluated later was seen here.
                accuracy = sampled_accuracy(model, tokenizer, operations, seed=10_000 + update)
                print(
                    f"{time.monotonic() - start:6.0f} s  update {update:4d}  {operations:2d} operations  "
                    f"loss {loss.item():.4f}  sampled accuracy {accuracy:.3f}",
                    flush=True,
                )
                if accuracy >= args.accuracy:
                    break
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved {sum(p.numel() for p in model.parameters()):,} parameters to {args.out}")


if __name__ == "__main__":
    main()
