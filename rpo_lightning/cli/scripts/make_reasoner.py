"""Make the embedded reasoner: ``python -m rpo_lightning.cli.scripts.make_reasoner``.

A Llama of 337k parameters learns the arithmetic from correct chains of 3, 8 and 24 operations. Then it imitates chains
that leave out steps at random. The result can do every step, but solves only about a third of fresh problems at
temperature 1, which leaves reinforcement learning something to improve. It is saved as a Hugging Face folder. The
package holds one in ``rpo_lightning/policy/arithmetic_reasoner``.

A GPU takes four minutes, a CPU most of an hour. Hardware rounds differently, so weights differ in their last bits.

``--operations N`` makes a reasoner for chains of other lengths. ``--start FOLDER`` continues from another one, with
new step names and larger distances to learn if its chains are shorter. ``--success P`` makes one that solves about that
share of its problems. ``--also N ...`` adds shorter chains to imitate. ``--foreign S`` lets that share of the chains
begin in a style that it only has to continue (``solution``).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rpo_lightning.cli.quiet import silence_libraries
from rpo_lightning.data.arithmetic import STEP_NAMES, draw_problem
from rpo_lightning.policy.export import save_policy
from rpo_lightning.policy.load import load_policy, resolve_policy
from rpo_lightning.policy.tokenizer import decode, load_tokenizer
from rpo_lightning.rollout.engine import GenerationRequest, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine

OPERATIONS = 24
# Correct chains: pairs of operations and updates. Then chains of full length, until this accuracy or these updates.
CURRICULUM = ((3, 200), (8, 200))
FULL_LENGTH_UPDATES = 2000
SUFFICIENT_ACCURACY = 0.3
# Chains with steps left out, with a decaying learning rate. A third of them has every step.
CARELESS_UPDATES = 600
CARELESS_SUCCESS = 1 / 3
LEARNING_RATE = 3e-3
WARMUP_UPDATES = 50
BATCH_OPERATIONS = 64 * 24
EVALUATION_PROBLEMS = 256
EVALUATE_EVERY = 20


def make_tokenizer(operations: int = OPERATIONS) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each character. ``^`` starts a prompt and ``$`` ends a response."""
    characters = "0123456789" + STEP_NAMES[: max(operations, 26)] + "+-*=#"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "^", "$", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", vocabulary["^"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="^", eos_token="$", pad_token="<pad>", unk_token="<unk>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, operations: int = OPERATIONS) -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16 * math.ceil(len(tokenizer) / 16),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,  # head_dim 32, the smallest that common attention kernels support
            max_position_embeddings=1024 * math.ceil(14 * operations / 1024),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def continue_from(start: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the weights of a reasoner for shorter chains. New step names start near the mean of its own."""
    known = load_tokenizer(str(start)).get_vocab()
    state: Any = load_policy(str(start)).state_dict()
    old = state.pop("model.embed_tokens.weight")
    state.pop("lm_head.weight", None)
    names = old[[known[n] for n in STEP_NAMES if n in known]]
    with torch.no_grad():
        embeddings = cast(Any, model).get_input_embeddings().weight
        embeddings.copy_(names.mean(0) + names.std(0) * torch.randn_like(embeddings))
        for token, index in tokenizer.get_vocab().items():
            if token in known:
                embeddings[index] = old[known[token]]
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class Chains:
    """Chains of thought to imitate.

    Attributes:
        operations: Numbers of operations, each as often as the others. The last one is evaluated.
        left_out_share: Probability of leaving out a step.
        foreign_share: Share of the chains that begin in the foreign style.
    """

    operations: Sequence[int]
    left_out_share: float = 0.0
    foreign_share: float = 0.0

    def draw(self, rng: np.random.Generator) -> tuple[str, str, str]:
        """A question, the beginning that is given, and the rest, which is to be imitated."""
        operations = int(rng.choice(self.operations)) if len(self.operations) > 1 else self.operations[0]
        problem = draw_problem(rng, operations)
        left_out = np.flatnonzero(rng.random(operations) < self.left_out_share)
        if self.foreign_share and rng.random() < self.foreign_share:
            given = int(rng.integers(1, operations))
            solution = problem.solution(left_out[left_out >= given], foreign_steps=given)
            end = solution.index(STEP_NAMES[given - 1]) + 1
            return problem.question, solution[:end], solution[end:]
        return problem.question, "", problem.solution(left_out)


def training_batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, chains: Chains
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids and labels (prompts and given beginnings masked), both [B, T]."""
    rows, labels = [], []
    for _ in range(max(BATCH_OPERATIONS // max(*chains.operations, OPERATIONS), 1)):
        question, beginning, rest = chains.draw(rng)
        given = tokenizer(question + beginning)["input_ids"]
        response = tokenizer(rest, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(given + response))
        labels.append(torch.tensor([-100] * len(given) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=-100),
    )


def sampled_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, operations: int, seed: int) -> float:
    """The share of fresh problems that one sample at temperature 1 solves."""
    rng = np.random.default_rng(seed)
    problems = [draw_problem(rng, operations) for _ in range(EVALUATION_PROBLEMS)]
    engine = TransformersEngine(max_sequences=256)
    engine.attach(model, tokenizer)
    engine.load_weights(model, version=0)
    requests = [GenerationRequest(tuple(tokenizer(p.question)["input_ids"]), 1, 14 * operations) for p in problems]
    outputs = engine.generate(requests, Sampling(), seed=seed)
    texts = [decode(tokenizer, c[0].token_ids) for c in outputs]
    right = [t.rpartition("#")[2] == p.answer for t, p in zip(texts, problems, strict=True)]
    return float(np.mean(right))


class Teaching:
    """Supervised updates of a model. Prints progress."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rng = rng
        self.update_count = 0
        self._started = time.monotonic()

    def run(self, chains: Chains, updates: int, decays: bool, sufficient: float = 2.0) -> None:
        """Make updates until there are ``updates``, or the sampled accuracy is at least ``sufficient``.

        Args:
            chains: What to imitate.
            updates: Most updates.
            decays: Whether the learning rate decays to 0.
            sufficient: Sampled accuracy at which to stop early; above 1 for never.
        """
        # Only here: its module imports peft, which imports bitsandbytes.
        from transformers import get_scheduler

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        name = "linear" if decays else "constant_with_warmup"
        every = EVALUATE_EVERY if sufficient <= 1 else updates // 3  # for progress only
        schedule = get_scheduler(name, optimizer, num_warmup_steps=WARMUP_UPDATES, num_training_steps=updates)
        for update in range(1, updates + 1):
            loss = self._update(optimizer, chains)
            schedule.step()
            if update % every == 0:
                operations = chains.operations[-1]
                # Data sets use smaller seeds, so these problems are not theirs.
                accuracy = sampled_accuracy(self.model, self.tokenizer, operations, seed=10_000 + self.update_count)
                print(
                    f"{time.monotonic() - self._started:6.0f} s  update {self.update_count:4d}  "
                    f"{operations:2d} operations  loss {loss:.4f}  sampled accuracy {accuracy:.3f}",
                    flush=True,
                )
                if accuracy >= sufficient:
                    return

    def _update(self, optimizer: torch.optim.Optimizer, chains: Chains) -> float:
        input_ids, labels = training_batch(self.rng, self.tokenizer, chains)
        input_ids, labels = input_ids.to(self.model.device), labels.to(self.model.device)
        mask = (input_ids != self.tokenizer.pad_token_id).long()
        loss = self.model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        self.update_count += 1
        return float(loss.detach())


def main() -> None:
    """Train a reasoner and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(resolve_policy("embedded:arithmetic-reasoner")))
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--start", type=Path, help="a reasoner to continue from, instead of the curriculum")
    parser.add_argument("--success", type=float, default=CARELESS_SUCCESS, help="share of chains with every step")
    parser.add_argument("--also", type=int, nargs="*", default=[], metavar="N", help="further lengths of chains")
    parser.add_argument("--foreign", type=float, default=0.0, help="share of chains with a foreign beginning")
    parser.add_argument("--updates", type=int, default=CARELESS_UPDATES, help="on chains with steps left out")
    parser.add_argument("--bfloat16", action="store_true", help="save the weights rounded, in half the space")
    args = parser.parse_args()
    silence_libraries()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.operations)
    model = make_model(tokenizer, args.operations)
    if args.start:
        continue_from(args.start, model, tokenizer)
    cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    teaching = Teaching(model, tokenizer, np.random.default_rng(args.seed))
    for operations, updates in () if args.start else CURRICULUM:
        teaching.run(Chains([operations]), updates, decays=False)
    teaching.run(Chains([args.operations]), FULL_LENGTH_UPDATES, decays=False, sufficient=SUFFICIENT_ACCURACY)
    left_out_share = 1 - args.success ** (1 / args.operations)
    chains = Chains([*args.also, args.operations], left_out_share, args.foreign)
    teaching.run(chains, args.updates, decays=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_policy(cast(Any, model).bfloat16() if args.bfloat16 else model, tokenizer, args.out)
    print(f"saved {sum(p.numel() for p in model.parameters()):,} parameters to {args.out}")


if __name__ == "__main__":
    main()
