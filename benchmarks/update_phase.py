"""The update: shared rows against plain rows, forward and backward.

``python benchmarks/update_phase.py`` measures one DAPO update (no optimizer step) of SmolLM2-135M
(``make smollm2``) on one group after a prompt of 32 tokens and a kept prefix of P tokens, with G suffixes
of S tokens, and of the embedded reasoner in some cells: seconds, peak memory, and the largest differences of
log-probs and gradients. "plain" has a row per response and the same output head; "shared" has one row per
group whatever it costs; what the automatic choice does is told beside. On a CPU plain rows of SmolLM2 pass in
micro-batches of one row or at most 1,024 tokens: what fits the cache is a third faster. The token ratio counts the
tokens that the layers compute; the work ratio counts operations, those of attention and of the output head included,
which sharing does not save. Shared rows are measured before and after plain ones; medians. The last line is JSON.
``--quick`` takes three cells of SmolLM2 and one repetition.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.machine import PeakMemory, ceilings, hardware
from common.random_policy import load
from common.work import ModelWork
from rpo_lightning.core.types import Completion, Group, Prompt, RolloutRequest
from rpo_lightning.policy.elementwise.choice import use_elementwise_kernels
from rpo_lightning.policy.prefix_sharing.attention import IMPLEMENTATION
from rpo_lightning.policy.prefix_sharing.flash_choice import use_flash_attention
from rpo_lightning.policy.prefix_sharing.gpu_check import active_implementation
from rpo_lightning.policy.prefix_sharing.logprobs import token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import RowCost, rows_of, shared_rows
from rpo_lightning.update.advantages import group_advantages
from rpo_lightning.update.loss import PolicyLoss
from rpo_lightning.update.objectives import DAPO
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
PROMPT = 32
CELLS = list(product((0, 256, 1024, 2048), (64, 128), (6, 16)))
# The embedded reasoner, for which long suffixes are dearer in a shared row than what sharing saves.
REASONER = "embedded:arithmetic-reasoner"
REASONER_CELLS = [(240, 10, 8), (200, 50, 8), (150, 100, 8), (0, 190, 8)]
# Tokens of a pass that fit a CPU's cache with SmolLM2.
SMALL_PASS = 1024
QUICK = [(0, 64, 6), (256, 64, 6), (1024, 64, 6)]


@dataclass(frozen=True)
class Cell:
    """Plain over shared at one prefix, suffix and group size."""

    prefix: int
    suffix: int
    group: int
    token_ratio: float
    work_ratio: float
    time_ratio: float
    memory_ratio: float
    plain_seconds: float
    shared_seconds: float
    max_logprob_diff: float
    max_grad_diff: float
    chosen_members_per_row: int
    plain_tflops: float
    shared_tflops: float


def make_group(prefix: int, suffix: int, size: int, vocabulary: int) -> Group:
    """A group of random tokens with alternating rewards."""
    generator = torch.Generator().manual_seed(prefix + suffix + size)

    least, most = min(100, vocabulary // 2), min(vocabulary, 40_000)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(least, most, (count,), generator=generator).tolist())

    request = RolloutRequest(Prompt("q", "", ids(PROMPT), ""), ids(prefix), suffix)
    completions = [Completion(ids(suffix), (0.0,) * suffix, True) for _ in range(size)]
    return Group(request, completions, [], [float(i % 2) for i in range(size)])


def run(
    policy: Any, group: Group, share: bool, max_tokens: int
) -> tuple[float, int, dict[str, torch.Tensor], PolicyLoss]:
    """One update's forward and backward passes: seconds, peak bytes, gradients."""
    policy.zero_grad(set_to_none=True)
    settings = UpdateSettings(micro_batch_tokens=max_tokens, share_prefixes=share)
    loss = PolicyLoss(policy, None, DAPO(), settings, pad_id=0)
    if share:
        loss._row_cost = RowCost(holds=True)  # share whatever it costs: cells where that loses are to be seen
    with PeakMemory() as memory:
        start = time.perf_counter()
        loss.backward([group], group_advantages([group.rewards]), lambda x, _: x.backward())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.bytes, {n: p.grad for n, p in policy.named_parameters()}, loss


def measure(
    policy: Any, prefix: int, suffix: int, size: int, repetitions: int, max_tokens: int, small_passes: bool
) -> Cell:
    """Measure a cell."""
    context = PROMPT + prefix
    budgets = {True: max_tokens, False: max(context + suffix, SMALL_PASS) if small_passes else max_tokens}
    group = make_group(prefix, suffix, size, policy.config.vocab_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, list[int]] = {True: [], False: []}
    gradients: dict[bool, dict[str, torch.Tensor]] = {}
    for _ in range(repetitions):
        for share in (True, False, True):  # plain takes minutes, in which the machine's speed drifts
            elapsed, peak, gradients[share], _ = run(policy, group, share, budgets[share])
            seconds[share].append(elapsed)
            memory[share].append(peak)
    largest = max(g.abs().max().item() for g in gradients[False].values())
    difference = max((g - gradients[True][n]).abs().max().item() for n, g in gradients[False].items())
    gradients.clear()
    policy.zero_grad(set_to_none=True)
    rows = rows_of([group], "suffix")
    computed = []
    policy.set_attn_implementation(IMPLEMENTATION)
    with torch.no_grad():
        for cost in (RowCost(shares=False), RowCost()):
            batch = shared_rows(rows, 10**9, cost)
            computed.append(token_logprobs(policy, batch, 1.0, 0, policy.device).logprobs_BS)
    plain_work, shared_work = (ModelWork.of(policy).update(context, suffix, size, share) for share in (False, True))
    automatic = PolicyLoss(policy, None, DAPO(), UpdateSettings(micro_batch_tokens=max_tokens), 0)
    chosen = max(len(row.members) for row in shared_rows(rows, max_tokens, automatic._row_cost))
    return Cell(
        prefix, suffix, size,
        token_ratio=size * (context + suffix) / (context + size * suffix),
        work_ratio=plain_work / shared_work,
        time_ratio=median(seconds[False]) / median(seconds[True]),
        memory_ratio=median(memory[False]) / max(median(memory[True]), 1),
        plain_seconds=median(seconds[False]),
        shared_seconds=median(seconds[True]),
        max_logprob_diff=(computed[0] - computed[1]).abs().max().item(),
        max_grad_diff=difference / largest,
        chosen_members_per_row=chosen,
        plain_tflops=plain_work / median(seconds[False]) / 1e12,
        shared_tflops=shared_work / median(seconds[True]) / 1e12,
    )  # fmt: skip


def cell(text: str) -> tuple[int, int, int]:
    """Read a cell's prefix, suffix and group size."""
    prefix, suffix, group = (int(part) for part in text.split(","))
    return prefix, suffix, group


def table(cells: list[Cell]) -> str:
    """A Markdown table."""
    lines = [
        "| P | S | G | token ratio | work ratio | time ratio | of the work ratio | memory ratio | plain s | shared s | "
        "log-prob diff | gradient diff | chosen per row | plain TFLOP/s | shared TFLOP/s |",
        "|" + " --- |" * 15,
    ]
    lines += [
        f"| {c.prefix} | {c.suffix} | {c.group} | {c.token_ratio:.2f} | {c.work_ratio:.2f} | {c.time_ratio:.2f} | "
        f"{c.time_ratio / c.work_ratio:.2f} | {c.memory_ratio:.2f} | {c.plain_seconds:.2f} | {c.shared_seconds:.2f} | "
        f"{c.max_logprob_diff:.1e} | {c.max_grad_diff:.1e} | {c.chosen_members_per_row} | "
        f"{c.plain_tflops:.3g} | {c.shared_tflops:.3g} |"
        for c in cells
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all cells in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384 if on_gpu else 8192)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--elementwise-kernels", choices=["auto", "liger", "none"], default="none")
    parser.add_argument("--flash-attention", choices=["FA2", "FA3", "FA4"], help="on a GPU; torch's own if not given")
    parser.add_argument(
        "--cells", type=cell, nargs="+", metavar="P,S,G", help="prefix, suffix and group size; the table's if not given"
    )
    parser.add_argument("--quick", action="store_true", help="three cells, one repetition")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "update_phase.json")
    arguments = parser.parse_args()
    repetitions = 1 if arguments.quick else arguments.repetitions
    measured: dict[str, list[Cell]] = {}
    large = arguments.cells or (QUICK if arguments.quick else CELLS)
    for name, cells in ((REASONER, REASONER_CELLS), (arguments.model, large)):
        policy: Any = load(name)[0]
        policy.to(device="cuda" if on_gpu else "cpu", dtype=getattr(torch, arguments.dtype))
        use_flash_attention(policy, arguments.flash_attention, policy.device)
        use_elementwise_kernels(policy, arguments.elementwise_kernels, policy.device)
        run(policy, make_group(64, 32, 2, policy.config.vocab_size), True, arguments.micro_batch_tokens)  # first touch
        measured[name] = []
        for prefix, suffix, size in cells:
            times = 15 if name == REASONER else repetitions
            small_passes = not on_gpu and name != REASONER
            measured[name].append(
                measure(policy, prefix, suffix, size, times, arguments.micro_batch_tokens, small_passes)
            )
            print(measured[name][-1], flush=True)
    passes = f"passes of at most {arguments.micro_batch_tokens} tokens"
    passes += "" if on_gpu else f" (plain rows of SmolLM2: one row or {SMALL_PASS})"
    kernels = f"elementwise kernels {arguments.elementwise_kernels}"
    kernels += f", flash attention {active_implementation()}" if on_gpu else ""  # the one that passed its trial
    setting = f"{arguments.dtype}, {kernels}, {passes}, medians of {repetitions} plain and {2 * repetitions} shared"
    print(f"\n{hardware()}; {setting}\n")
    for name, of_model in measured.items():
        print(f"{Path(name).name}\n\n{table(of_model)}\n")
    record = {
        "hardware": hardware(), "setting": setting, "ceilings": ceilings() if on_gpu else None,
        "cells": [asdict(c) for c in measured[arguments.model]],
        "reasoner_cells": [asdict(c) for c in measured[REASONER]],
    }  # fmt: skip
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
