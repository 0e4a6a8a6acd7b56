"""Weight syncs of a LoRA policy: merged weights against the adapter alone, in bytes, seconds and decoding speed.

``python benchmarks/adapter_sync.py`` measures SmolLM2-135M (``make smollm2``) with LoRA of rank 16 on all linear
layers, on vLLM, with G = 6 samples a group and two groups at once. Each round starts an engine of either kind, in
turn, changes the adapter and syncs five times, and decodes: suffixes of 32 tokens after a prompt of 64 and a prefix of
448, and 64 tokens after the prompt alone. Ratios are adapter over merged within a round; the table has their median and
range over the rounds. *Tokens to break even*, of each round: an iteration that decodes more is faster with merged
weights; "none" where the adapter decodes no slower. *Difference* is the mean distance of the engine's log-probs from
the policy's, which computes in fp32. On a machine with other work processor seconds are steadier. The last line is
JSON. ``--quick`` takes one short round and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from common.endless import load_endless
from common.machine import hardware
from common.tables import table
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.rollout import EngineSetup, GenerationRequest, Sampling, VLLMEngine
from rpo_lightning.rollout.vllm.weight_transfer import Sync

ROOT = Path(__file__).parents[1]
SYNCS: tuple[Sync, ...] = ("merged", "adapter")
CLOCKS = ("second", "processor second")
PROMPT = 64
CELLS = [(448, 32), (0, 64)]


def change(policy: Any, generator: torch.Generator) -> None:
    """Change the adapter by a little, as an update does."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))


def timed(function: Any, *args: Any) -> tuple[list[float], Any]:
    """Seconds and processor seconds of a call, and what it returned."""
    start, used = time.perf_counter(), time.process_time()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return [time.perf_counter() - start, time.process_time() - used], result


def requests(generator: np.random.Generator, groups: int, context: int, n: int, suffix: int) -> list[GenerationRequest]:
    """Groups with new contexts."""
    rows = generator.integers(100, 40_000, size=(groups, context)).tolist()
    return [GenerationRequest(tuple(row), n, suffix) for row in rows]


def difference(engine: VLLMEngine, policy: Any, asked: list[GenerationRequest]) -> float:
    """Mean distance of the engine's log-probs of sampled tokens from the policy's, in nats."""
    found = []
    for request, completions in zip(asked, engine.generate(asked, Sampling(), 0), strict=True):
        for completion in completions:
            ids = torch.tensor([request.token_ids + completion.token_ids])
            with torch.no_grad():
                logits = policy(input_ids=ids, use_cache=False).logits[0, :-1]
            own = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)[-len(completion.logprobs) :]
            found.append((torch.tensor(completion.logprobs) - own).abs())
    return float(torch.cat(found).mean())


def measure(engine: VLLMEngine, policy: Any, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Measure a running engine: seconds and bytes of a sync, tokens per second of each cell, and the difference."""
    changes = torch.Generator().manual_seed(seed)
    seconds = []
    for version in range(arguments.syncs):
        change(policy, changes)
        seconds.append(timed(engine.load_weights, policy, 1 + version)[0])
    found: dict[str, float] = {"sync, bytes": engine.synced_bytes}
    for number, clock in enumerate(CLOCKS):
        found[f"sync, {clock}s"] = median(s[number] for s in seconds)
    drawn = np.random.default_rng(seed)
    for prefix, suffix in arguments.cells:
        rates = []
        for _ in range(arguments.repetitions):
            asked = requests(drawn, arguments.groups, PROMPT + prefix, arguments.group, suffix)
            taken, outputs = timed(engine.generate, asked, Sampling(), seed)
            tokens = sum(len(c.token_ids) for completions in outputs for c in completions)
            rates.append([tokens / s for s in taken])
        for number, clock in enumerate(CLOCKS):
            found[f"{prefix}+{suffix}, tokens a {clock}"] = median(r[number] for r in rates)
    found["difference"] = difference(engine, policy, requests(drawn, 1, PROMPT, arguments.group, 32))
    return found


def one_round(policy: Any, tokenizer: Any, arguments: argparse.Namespace, number: int) -> dict[str, dict[str, float]]:
    """Measure both kinds of engine. The kind that was first is last in the next round."""
    measured: dict[str, dict[str, float]] = {}
    for sync in SYNCS if number % 2 == 0 else SYNCS[::-1]:
        engine = VLLMEngine(sync=sync, dtype=arguments.engine_dtype, **arguments.engine)
        longest = PROMPT + max(sum(c) for c in arguments.cells)
        engine.attach(policy, tokenizer, EngineSetup(max_length=longest))
        engine.load_weights(policy, 0)
        engine.generate(requests(np.random.default_rng(0), arguments.groups, PROMPT, arguments.group, 8), Sampling(), 0)
        measured[sync] = measure(engine, policy, arguments, number)
        engine.shutdown()
        print(number, sync, measured[sync], flush=True)
    return measured


def break_even(merged: dict[str, float], adapter: dict[str, float], rate: str) -> float | None:
    """Tokens of an iteration that take the time which the shorter sync saves; ``None`` if decoding is no slower."""
    lost = 1 / adapter[rate] - 1 / merged[rate]
    sync = f"sync, {rate.rpartition(' a ')[2]}s"
    return max(0.0, (merged[sync] - adapter[sync]) / lost) if lost > 0 else None


def compare(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, object]]:
    """A row for each figure: medians of both, and the median, lowest and highest ratio within a round."""
    rows: list[dict[str, object]] = []
    for name in rounds[0]["merged"]:
        ratios = [r["adapter"][name] / r["merged"][name] for r in rounds]
        merged, adapter = (median(r[sync][name] for r in rounds) for sync in SYNCS)
        form = ",.0f" if name == "sync, bytes" else ".3g"
        row: dict[str, object] = {"figure": name, "merged": f"{merged:{form}}", "adapter": f"{adapter:{form}}"}
        row |= {"adapter / merged": f"{median(ratios):.3f}", "range": f"{min(ratios):.3f} to {max(ratios):.3f}"}
        tokens = [break_even(r["merged"], r["adapter"], name) for r in rounds] if "tokens" in name else []
        told = ["none" if t is None else f"{t:,.0f}" for t in tokens]
        rows.append(row | {"tokens to break even": "; ".join(told)})
    return rows


def cell(text: str) -> tuple[int, int]:
    """Read a cell's prefix and suffix."""
    prefix, suffix = (int(part) for part in text.split(","))
    return prefix, suffix


def main() -> None:
    """Measure everything in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--engine-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--engine", type=json.loads, default={}, help="VLLMEngine's further settings as JSON")
    parser.add_argument("--cells", type=cell, nargs="+", default=CELLS, metavar="P,S", help="prefix and suffix")
    parser.add_argument("--groups", type=int, default=2, help="groups generated at once")
    parser.add_argument("--group", type=int, default=6, help="samples of a group")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--syncs", type=int, default=5, help="syncs in a round")
    parser.add_argument("--repetitions", type=int, default=1, help="rollouts of a cell in a round")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adapter_sync.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cells, arguments.rounds, arguments.syncs, arguments.repetitions = [(32, 16)], 1, 2, 1
    policy, tokenizer = load_endless(arguments.model)
    policy.to(getattr(torch, arguments.engine_dtype)).float()  # a base that the engine need not round
    policy = LoRA(rank=arguments.rank, alpha=2 * arguments.rank).apply(policy).eval()
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    rounds = [one_round(policy, tokenizer, arguments, number) for number in range(arguments.rounds)]
    rows = compare(rounds)
    setting = f"{Path(arguments.model).name}, LoRA of rank {arguments.rank}, engine in {arguments.engine_dtype}, "
    setting += f"{arguments.groups} groups of {arguments.group} at once, {arguments.rounds} rounds, "
    setting += f"{torch.get_num_threads()} threads"
    print(f"\n{hardware()}; {setting}\n\n{table(rows)}\n")
    record = {"hardware": hardware(), "setting": setting, "rounds": rounds, "rows": rows}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
