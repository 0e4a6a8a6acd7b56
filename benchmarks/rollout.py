"""Rollouts on both engines, and what a weight sync costs.

``python benchmarks/rollout.py`` measures SmolLM2-135M (``make smollm2``) with G = 6 samples a group after
a prompt of 64 tokens and a kept prefix: a full path of 512 tokens against suffixes of 64. Sampled tokens
per second, seconds per group, and the share of them that computing prompt and prefix took; then the
seconds of a weight sync against a plain copy of as many bytes. Both engines run in one process on the
same prompts, in the same precision; every repetition has new prompts, so that nothing is cached before
it begins. The last line is JSON. ``--quick`` takes one short repetition each.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from endless import load_endless
from machine import hardware

from rpo_lightning.engines import (
    EngineContext,
    GenerationRequest,
    RolloutEngine,
    Sampling,
    TransformersEngine,
    VLLMEngine,
)

ROOT = Path(__file__).parents[1]
PROMPT, GROUP = 64, 6
CELLS = [(0, 512), (448, 64), (960, 64)]


@dataclass(frozen=True)
class Cell:
    """One engine at one prefix and suffix length; medians over repetitions."""

    engine: str
    prefix: int
    suffix: int
    decoded_tokens_per_s: float
    seconds_per_group: float
    prefill_share: float


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    """Seconds of a call, with the GPU's work in it, and what it returned."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(engine: RolloutEngine, name: str, prefix: int, suffix: int, groups: int, repetitions: int) -> Cell:
    """Measure a cell; what is prefill is told by asking for a single token of the same prompts' like."""
    figures = []
    for repetition in range(repetitions):
        generator = np.random.default_rng([prefix, suffix, repetition])
        ids = generator.integers(100, 40_000, size=(2, groups, PROMPT + prefix)).tolist()
        one = [GenerationRequest(tuple(row), GROUP, 1) for row in ids[0]]
        all_ = [GenerationRequest(tuple(row), GROUP, suffix) for row in ids[1]]
        prefill, _ = timed(engine.generate, one, Sampling(), repetition)
        seconds, outputs = timed(engine.generate, all_, Sampling(), repetition)
        tokens = sum(len(c.token_ids) for completions in outputs for c in completions)
        figures.append((tokens / seconds, seconds / groups, min(prefill / seconds, 1.0)))
    rate, per_group, share = (median(column) for column in zip(*figures, strict=True))
    return Cell(name, prefix, suffix, rate, per_group, share)


def measure_sync(engine: RolloutEngine, policy: Any, repetitions: int) -> dict[str, float]:
    """Seconds of a weight sync, and of copying as many bytes."""
    weights = [p.detach() for p in policy.parameters()]
    copies = [torch.empty_like(w) for w in weights]
    size = sum(w.numel() * w.element_size() for w in weights) / 1e9

    def copy() -> None:
        for source, target in zip(weights, copies, strict=True):
            target.copy_(source)

    engine.load_weights(policy, 1)
    sync = median(timed(engine.load_weights, policy, 2 + i)[0] for i in range(repetitions))
    copy()
    memcpy = median(timed(copy)[0] for _ in range(repetitions))
    return {"gbytes": size, "seconds": sync, "gbytes_per_s": size / sync, "memcpy_gbytes_per_s": size / memcpy}


def table(cells: list[Cell]) -> str:
    """A Markdown table."""
    lines = [
        "| engine | prefix | suffix | decoded tokens/s | seconds per group | prefill share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {c.engine} | {c.prefix} | {c.suffix} | {c.decoded_tokens_per_s:,.0f} | {c.seconds_per_group:.2f} | "
        f"{c.prefill_share:.2f} |"
        for c in cells
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--groups", type=int, default=32 if on_gpu else 2, help="groups generated at once")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one group, one repetition, half the suffixes, an eighth of the full path"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "rollout.json")
    arguments = parser.parse_args()
    cells = [(0, 64), (448, 32), (960, 32)] if arguments.quick else CELLS
    groups, repetitions = (1, 1) if arguments.quick else (arguments.groups, arguments.repetitions)
    policy, tokenizer = load_endless(arguments.model)
    policy.to(device="cuda" if on_gpu else "cpu", dtype=getattr(torch, arguments.dtype))
    context = EngineContext(max_length=PROMPT + 1024, dtype=policy.dtype)
    engines: dict[str, RolloutEngine] = {"transformers": TransformersEngine(), "vllm": VLLMEngine()}
    results = []
    for name, engine in engines.items():
        engine.attach(policy, tokenizer, context)
        engine.load_weights(policy, 0)
        # Compilation and first touches are no part of what is measured.
        engine.generate([GenerationRequest(tuple(range(100, 164)), GROUP, 8)] * groups, Sampling(), 0)
        for prefix, suffix in cells:
            results.append(measure(engine, name, prefix, suffix, groups, repetitions))
            print(results[-1], flush=True)
    sync = measure_sync(engines["vllm"], policy, repetitions)
    engines["vllm"].shutdown()
    setting = f"{arguments.dtype}, {groups} groups of {GROUP} at once, median of {repetitions}"
    print(f"\n{hardware()}; {setting}\n\n{table(results)}\n")
    print(
        f"sync of {sync['gbytes']:.2f} GB: {sync['seconds']:.2f} s, {sync['gbytes_per_s']:.2f} GB/s "
        f"(plain copy: {sync['memcpy_gbytes_per_s']:.2f} GB/s)\n"
    )
    record = {"hardware": hardware(), "setting": setting, "cells": [asdict(c) for c in results], "sync": sync}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
