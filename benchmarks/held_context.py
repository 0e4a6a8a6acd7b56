"""A group in several passes: its context computed once against its context computed with every pass.

``python benchmarks/held_context.py`` makes updates of SmolLM2-135M (``make smollm2``) on one group of 16 responses that
continue 1,056 tokens with 128 tokens each, in passes of several sizes, both ways in turn. Seconds and peak memory are
medians; gradients are compared. The last line is JSON. ``--quick`` takes a short context.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from update_phase import PROMPT, make_group

from common.machine import PeakMemory, hardware
from common.random_policy import load
from rpo_lightning.policy.prefix_sharing.rows import RowCost, rows_of
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
WAYS = {"repeated": False, "once": True}


@dataclass(frozen=True)
class Measured:
    """One size of passes.

    Attributes:
        max_tokens: Most tokens of a pass.
        passes: Number of passes that compute suffixes.
        token_ratio: Computed tokens with repeated contexts over those with one.
        time_ratio: The same of seconds.
        memory_ratio: The same of peak memory.
        repeated_seconds: Seconds of an update with repeated contexts.
        once_seconds: Seconds of an update that computes the context once.
        gradient_difference: Largest difference of the gradients over the largest gradient.
    """

    max_tokens: int
    passes: int
    token_ratio: float
    time_ratio: float
    memory_ratio: float
    repeated_seconds: float
    once_seconds: float
    gradient_difference: float


def measure(policy: Any, prefix: int, suffix: int, size: int, max_tokens: int, repetitions: int) -> Measured:
    """Make updates both ways in turn."""
    group = make_group(prefix, suffix, size, policy.config.vocab_size)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    memory: dict[str, list[int]] = {way: [] for way in WAYS}
    tokens, gradients, passes = {}, {}, 0
    for _ in range(repetitions):
        for way, holds in WAYS.items():
            policy.zero_grad(set_to_none=True)
            loss = PolicyLoss(policy, None, DAPO(), UpdateSettings(micro_batch_tokens=max_tokens), pad_id=0)
            loss._row_cost = RowCost(holds=holds)
            passes = sum(not step.closes for step in loss._passes(rows_of([group], "suffix"), gradient=True))
            with PeakMemory() as peak:
                start = time.perf_counter()
                loss.backward([group], group_advantages([group.rewards]), lambda x, _: x.backward())
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[way].append(time.perf_counter() - start)
            memory[way].append(peak.bytes)
            tokens[way] = loss.processed_tokens["update"]
            gradients[way] = [p.grad for p in policy.parameters()]
    pairs = list(zip(*gradients.values(), strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)
    policy.zero_grad(set_to_none=True)
    return Measured(
        max_tokens, passes,
        token_ratio=tokens["repeated"] / tokens["once"],
        time_ratio=median(seconds["repeated"]) / median(seconds["once"]),
        memory_ratio=median(memory["repeated"]) / max(median(memory["once"]), 1),
        repeated_seconds=median(seconds["repeated"]),
        once_seconds=median(seconds["once"]),
        gradient_difference=difference,
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or random:NAME")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "held_context.json")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    policy = load(arguments.model)[0].train()
    prefix, suffix, size = (128, 16, 8) if arguments.quick else (1024, 128, 16)
    context = PROMPT + prefix
    budgets = [context + suffix * members for members in (2, 4)]
    rows = []
    print(f"{'tokens':>8} {'passes':>7} {'token ratio':>12} {'time ratio':>11} {'memory ratio':>13}")
    for budget in budgets:
        row = measure(policy, prefix, suffix, size, budget, 1 if arguments.quick else arguments.repetitions)
        rows.append(row)
        print(
            f"{row.max_tokens:>8} {row.passes:>7} {row.token_ratio:>12.2f} {row.time_ratio:>11.2f} "
            f"{row.memory_ratio:>13.2f}",
            flush=True,
        )
    record = {
        "hardware": hardware(), "model": Path(arguments.model).name, "context": context, "suffix": suffix,
        "group": size, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
