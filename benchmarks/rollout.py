"""Rollouts on both engines, and what a weight sync costs.

``python benchmarks/rollout.py`` measures SmolLM2-135M (``make smollm2``) with G = 6 samples a group after
a prompt of 64 tokens and a kept prefix: a full path of 512 tokens against suffixes of 64. Sampled tokens
per second, seconds per group, and the share of them that computing prompt and prefix took; then the
seconds of a weight sync against a plain copy of as many bytes. Both engines run in one process on the
same prompts, in the same precision; every repetition has new prompts, so that nothing is cached before
it begins. Decoding's GB/s are the weights and the cache that its steps have to read (``work.py``). Sizes are
options. The last line is JSON. ``--quick`` takes one short repetition each.
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

from common.endless import load_endless
from common.machine import ceilings, hardware
from common.work import ModelWork
from rpo_lightning.rollout import (
    EngineSetup,
    GenerationRequest,
    RolloutEngine,
    Sampling,
    TransformersEngine,
    VLLMEngine,
)

ROOT = Path(__file__).parents[1]
PROMPT = 64
CELLS = [(0, 512), (448, 64), (960, 64)]
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class Cell:
    """One engine at one prefix and suffix length; medians over repetitions."""

    engine: str
    prefix: int
    suffix: int
    decoded_tokens_per_s: float
    seconds_per_group: float
    prefill_share: float
    decode_gbytes_per_s: float


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    """Seconds of a call, with the GPU's work in it, and what it returned."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(
    engine: RolloutEngine, name: str, prefix: int, suffix: int, arguments: argparse.Namespace, policy: Any
) -> Cell:
    """Measure a cell; what is prefill is told by asking for a single token of the same prompts' like."""
    figures = []
    groups, group, context = arguments.groups, arguments.group, PROMPT + prefix
    to_read = ModelWork.of(policy).decoding(context, suffix, groups * group, policy.dtype.itemsize)
    for repetition in range(arguments.repetitions):
        generator = np.random.default_rng([prefix, suffix, repetition])
        ids = generator.integers(100, 40_000, size=(2, groups, context)).tolist()
        one = [GenerationRequest(tuple(row), group, 1) for row in ids[0]]
        all_ = [GenerationRequest(tuple(row), group, suffix) for row in ids[1]]
        prefill, _ = timed(engine.generate, one, Sampling(), repetition)
        seconds, outputs = timed(engine.generate, all_, Sampling(), repetition)
        tokens = sum(len(c.token_ids) for completions in outputs for c in completions)
        rate = to_read / max(seconds - prefill, 1e-9) / 1e9
        figures.append((tokens / seconds, seconds / groups, min(prefill / seconds, 1.0), rate))
    return Cell(name, prefix, suffix, *(median(column) for column in zip(*figures, strict=True)))


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


def print_sync(sync: dict[str, float]) -> None:
    """One line."""
    print(
        f"sync of {sync['gbytes']:.2f} GB: {sync['seconds']:.2f} s, {sync['gbytes_per_s']:.2f} GB/s "
        f"(plain copy: {sync['memcpy_gbytes_per_s']:.2f} GB/s)\n"
    )


def cell(text: str) -> tuple[int, int]:
    """Read a cell's prefix and suffix."""
    prefix, suffix = (int(part) for part in text.split(","))
    return prefix, suffix


def table(cells: list[Cell]) -> str:
    """A Markdown table."""
    lines = [
        "| engine | prefix | suffix | decoded tokens/s | seconds per group | prefill share | decode GB/s |",
        "|" + " --- |" * 7,
    ]
    lines += [
        f"| {c.engine} | {c.prefix} | {c.suffix} | {c.decoded_tokens_per_s:,.0f} | {c.seconds_per_group:.2f} | "
        f"{c.prefill_share:.2f} | {c.decode_gbytes_per_s:.3g} |"
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
    parser.add_argument("--group", type=int, default=6, help="samples of a group")
    parser.add_argument("--cells", type=cell, nargs="+", default=CELLS, metavar="P,S", help="prefix and suffix")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--engine", type=json.loads, default={}, help="VLLMEngine's settings as JSON")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one group, one repetition, half the suffixes, an eighth of the full path"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rollout.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cells, arguments.groups, arguments.repetitions = [(0, 64), (448, 32), (960, 32)], 1, 1
    policy, tokenizer = load_endless(arguments.model)
    policy.to(device="cuda" if on_gpu else "cpu", dtype=getattr(torch, arguments.dtype))
    context = EngineSetup(max_length=PROMPT + max(sum(c) for c in arguments.cells), dtype=policy.dtype)
    results, sync = [], None
    for name in arguments.engines:
        at_once = arguments.groups * arguments.group
        engine = VLLMEngine(**arguments.engine) if name == "vllm" else TransformersEngine(at_once)
        engine.attach(policy, tokenizer, context)
        engine.load_weights(policy, 0)
        # Compilation and first touches are no part of what is measured.
        first = GenerationRequest(tuple(range(100, 164)), arguments.group, 8)
        engine.generate([first] * arguments.groups, Sampling(), 0)
        for prefix, suffix in arguments.cells:
            results.append(measure(engine, name, prefix, suffix, arguments, policy))
            print(results[-1], flush=True)
        if name == "vllm":
            sync = measure_sync(engine, policy, arguments.repetitions)
        engine.shutdown()
    setting = f"{Path(arguments.model).name}, {arguments.dtype}, {arguments.groups} groups of {arguments.group} at once"
    setting += f", median of {arguments.repetitions}"
    print(f"\n{hardware()}; {setting}\n\n{table(results)}\n")
    if sync is not None:
        print_sync(sync)
    record = {
        "hardware": hardware(), "setting": setting, "ceilings": ceilings() if on_gpu else None,
        "cells": [asdict(c) for c in results], "sync": sync,
    }  # fmt: skip
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
