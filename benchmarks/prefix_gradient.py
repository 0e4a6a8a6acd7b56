"""The gradient without the prefix's part: how biased it is, and what it saves.

``python benchmarks/prefix_gradient.py``. Bias: groups of the embedded reasoner after kept shares of right answers; the
cosine of the gradient with ``prefix_gradient: false`` and the exact one, and their norms' ratio. The yardstick is the
cosine of the exact gradients of the two halves of the groups, which differ by sampling alone. Cost: one update of
SmolLM2-135M (``make smollm2``) at a prefix of 1,024 tokens, suffixes of 64 and G = 6, both ways in turn, medians.
The last line is JSON. ``--quick`` takes fewer groups and a short prefix.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from update_phase import make_group

from common.machine import PeakMemory, hardware
from rpo_lightning.core.types import Completion, Group, Prompt, RolloutRequest
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import decode, load_tokenizer
from rpo_lightning.rollout.engine import GenerationRequest, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
REASONER = "embedded:arithmetic-reasoner"
LIMIT = 320
SHARES = (0.1, 0.35, 0.6, 0.85)


def answer(
    engine: TransformersEngine, prefixes: list[tuple[int, ...]], samples: int, seed: int
) -> list[list[Completion]]:
    """Sample continuations."""
    requests = [GenerationRequest(ids, samples, LIMIT) for ids in prefixes]
    return engine.generate(requests, Sampling(), seed)


def make_groups(policy: Any, problems: int, share: float, size: int) -> list[Group]:
    """Groups that continue a kept share of a right answer and have rewards that differ."""
    tokenizer = load_tokenizer(REASONER)
    engine = TransformersEngine(max_sequences=256)
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, version=0)
    rows = list(ArithmeticChain(problems, seed=5).rows())
    prompts = [
        Prompt(str(i), r["question"], tuple(tokenizer(r["question"])["input_ids"]), r["answer"])
        for i, r in enumerate(rows)
    ]

    def is_right(ids: tuple[int, ...], prompt: Prompt) -> bool:
        return decode(tokenizer, ids).rpartition("#")[2] == prompt.answer

    firsts = answer(engine, [p.token_ids for p in prompts], 4, seed=1)
    anchors = {}
    for prompt, completions in zip(prompts, firsts, strict=True):
        right = [c.token_ids for c in completions if is_right(c.token_ids, prompt)]
        if right:
            anchors[prompt.uid] = (prompt, right[0][: int(share * len(right[0]))])
    suffixes = answer(engine, [p.token_ids + prefix for p, prefix in anchors.values()], size, seed=2)
    groups = []
    for (prompt, prefix), completions in zip(anchors.values(), suffixes, strict=True):
        rewards = [float(is_right(c.token_ids, prompt)) for c in completions]
        groups.append(Group(RolloutRequest(prompt, prefix, LIMIT), completions, [], rewards))
    return [g for g in groups if g.has_variance]


def gradient(policy: Any, groups: list[Group], exact: bool) -> Tensor:
    """The gradient of DAPO's loss, flat."""
    settings = UpdateSettings(micro_batch_tokens=8192, prefix_gradient=exact)
    policy.zero_grad(set_to_none=True)
    advantages = group_advantages([g.rewards for g in groups])
    PolicyLoss(policy, None, DAPO(), settings, pad_id=0).backward(groups, advantages, lambda x, _: x.backward())
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def bias(problems: int) -> list[dict[str, float]]:
    """A row for each kept share."""
    policy: Any = load_policy(REASONER)
    rows = []
    for share in SHARES:
        groups = make_groups(policy, problems, share, size=8)
        exact, frozen = gradient(policy, groups, True), gradient(policy, groups, False)
        halves = [gradient(policy, part, True) for part in (groups[::2], groups[1::2])]
        rows.append(
            {
                "kept_share": share,
                "groups": len(groups),
                "cosine": torch.cosine_similarity(exact, frozen, dim=0).item(),
                "norm_ratio": (frozen.norm() / exact.norm()).item(),
                "cosine_of_halves": torch.cosine_similarity(halves[0], halves[1], dim=0).item(),
            }
        )
    return rows


def cost(model: str, prefix: int, repetitions: int) -> dict[str, float]:
    """Seconds and memory of an update, both ways."""
    policy: Any = load_policy(model)
    group = make_group(prefix, 64, 6, policy.config.vocab_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, list[int]] = {True: [], False: []}
    gradient(policy, [make_group(64, 32, 2, policy.config.vocab_size)], True)  # first touches
    for _ in range(repetitions):
        for exact in (True, False):
            policy.zero_grad(set_to_none=True)
            with PeakMemory() as peak:
                start = time.perf_counter()
                gradient(policy, [group], exact)
                seconds[exact].append(time.perf_counter() - start)
            memory[exact].append(peak.bytes)
    return {
        "prefix": prefix,
        "exact_seconds": median(seconds[True]),
        "without_seconds": median(seconds[False]),
        "time_ratio": median(seconds[True]) / median(seconds[False]),
        "memory_ratio": median(memory[True]) / median(memory[False]),
    }


def main() -> None:
    """Measure bias and cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="32 problems, a prefix of 256 tokens, once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prefix_gradient.json")
    arguments = parser.parse_args()
    problems, prefix, repetitions = arguments.problems, arguments.prefix, arguments.repetitions
    if arguments.quick:
        problems, prefix, repetitions = 32, 256, 1
    rows = bias(problems)
    measured = cost(arguments.model, prefix, repetitions)
    columns = list(rows[0])
    print(f"\n{hardware()}\n\n| {' | '.join(c.replace('_', ' ') for c in columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |")
    print(f"\nupdate at a prefix of {prefix}: {measured}\n")
    record = {"hardware": hardware(), "bias": rows, "cost": measured}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
