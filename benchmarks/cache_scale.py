"""The experience cache with up to a million responses of 2,000 tokens: time and memory.

``python benchmarks/cache_scale.py`` fills caches of 10,000, 100,000 and 1,000,000 questions with responses of 1,000 to
3,000 random tokens and, in a process of its own for each size, loads them from Parquet, looks responses up in random
order, serves prefixes and takes groups of two back (a fifth of the questions, prefix and suffix as in training), saves
a checkpoint and a Parquet file, and in another process loads the checkpoint. Memory is what the process grew by
over the bytes of the tokens that it holds. The last line is JSON. ``--quick`` has 10,000 and 50,000 questions.
The largest size takes some 10 GB of memory and 25 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.machine import hardware
from rpo_lightning.cache.budgets import FullBudget
from rpo_lightning.cache.cache import CachedResponse, ExperienceCache
from rpo_lightning.cache.cuts import FractionOfShortestCut
from rpo_lightning.cache.parquet import read_cache, write_cache
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.cache.refresh import EpsilonGreedyRefresh
from rpo_lightning.core.types import Completion, Group, Prompt, RolloutRequest, Sample

ROOT = Path(__file__).parents[1]
SHORTEST, LONGEST, VOCABULARY = 1000, 3000, 50_000
LOOKUPS, UPDATED_SHARE = 20_000, 0.2
COLUMNS = {
    "entries": "{:,.0f}",
    "token_gbytes": "{:.2f}",
    "load_us_per_entry": "{:.1f}",
    "lookup_us": "{:.1f}",
    "lookup_p99_us": "{:.1f}",
    "request_us": "{:.0f}",
    "request_p99_us": "{:.0f}",
    "remember_us": "{:.1f}",
    "record_us": "{:.0f}",
    "record_p99_us": "{:.0f}",
    "record_max_ms": "{:.0f}",
    "statistics_ms": "{:.2f}",
    "checkpoint_us_per_entry": "{:.1f}",
    "resume_us_per_entry": "{:.1f}",
    "save_us_per_entry": "{:.1f}",
}
MEMORY = (
    "memory_filled", "memory_loaded", "memory_updated", "memory_resumed",
    "peak_filling", "peak_loading", "peak_updating", "peak_checkpoint", "peak_saving", "peak_resuming",
)  # fmt: skip


def process_bytes(key: str) -> int:
    """Memory of this process: ``VmRSS`` is what it has, ``VmHWM`` the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Memory:
    """Growth of the process over the bytes of the tokens in its cache."""

    def __init__(self) -> None:
        gc.collect()
        self._before = process_bytes("VmRSS")

    def ratio(self, cache: ExperienceCache, key: str = "VmRSS") -> float:
        """Growth since the beginning; with ``VmHWM`` the largest so far."""
        return (process_bytes(key) - self._before) / token_bytes(cache)


def token_bytes(cache: ExperienceCache) -> float:
    """Bytes of the tokens of all responses."""
    statistics = cache.statistics(0)
    return statistics["length"] * statistics["responses"] * np.dtype(np.int32).itemsize


def seconds(function: Any, *args: Any) -> float:
    """Processor seconds of a call, all threads together: what else the machine does is not in them."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def uids(count: int) -> Iterator[str]:
    """Names as data sets without a column of ids get them: 16 hexadecimal digits."""
    return (f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}" for i in range(count))


def warm_up(folder: Path) -> None:
    """Import and start whatever the first save and load do."""
    cache = ExperienceCache("benchmark")
    cache.remember("q", CachedResponse(np.zeros(10, np.int32), 0.0, True, True, ((0, 10),)))
    write_cache(cache, folder / "small.parquet")
    cache = read_cache(folder / "small.parquet", cache.tokenizer_fingerprint)
    torch.save(cache.state_dict(), folder / "small.ckpt")
    cache.load_state_dict(torch.load(folder / "small.ckpt", weights_only=True))


def fill(count: int, folder: Path) -> dict[str, float]:
    """Make a cache and save it."""
    generator = np.random.default_rng(0)
    memory, cache, spent = Memory(), ExperienceCache("benchmark"), 0.0
    for uid in uids(count):
        length = int(generator.integers(SHORTEST, LONGEST + 1))
        ids = generator.integers(0, VOCABULARY, length, dtype=np.int32)
        response = CachedResponse(ids, float(generator.random()), bool(length % 2), True, ((0, length),))
        spent += seconds(cache.remember, uid, response)
    filled = memory.ratio(cache)
    saving = seconds(write_cache, cache, folder / "cache.parquet")
    return {
        "entries": count,
        "remember_us": 1e6 * spent / count,
        "memory_filled": filled,
        "save_us_per_entry": 1e6 * saving / count,
        "peak_filling": memory.ratio(cache, "VmHWM"),
    }


def use(count: int, folder: Path) -> dict[str, float]:
    """Load, look up, update and save a cache."""
    memory = Memory()
    start = time.process_time()
    cache = read_cache(folder / "cache.parquet", "benchmark")
    figures = {
        "load_us_per_entry": 1e6 * (time.process_time() - start) / count,
        "memory_loaded": memory.ratio(cache),
        "peak_loading": memory.ratio(cache, "VmHWM"),
        "token_gbytes": token_bytes(cache) / 1e9,
    }
    generator = np.random.default_rng(1)
    names = list(uids(count))
    chosen = [names[i] for i in generator.integers(0, count, LOOKUPS)]
    figures |= spread("lookup", [seconds(look_up, cache, uid) for uid in chosen])
    figures |= update(cache, [names[i] for i in generator.permutation(count)[: int(UPDATED_SHARE * count)]], generator)
    del names, chosen
    figures["statistics_ms"] = 1e3 * float(np.median([seconds(cache.statistics, 2) for _ in range(5)]))
    figures["memory_updated"], figures["peak_updating"] = memory.ratio(cache), memory.ratio(cache, "VmHWM")
    checkpoint = seconds(lambda: torch.save(cache.state_dict(), folder / "cache.ckpt"))
    figures["checkpoint_us_per_entry"] = 1e6 * checkpoint / count
    figures["peak_checkpoint"] = memory.ratio(cache, "VmHWM")
    write_cache(cache, folder / "cache.parquet")
    figures["peak_saving"] = memory.ratio(cache, "VmHWM")
    return figures


def resume(count: int, folder: Path) -> dict[str, float]:
    """Load a checkpoint."""
    memory, cache = Memory(), ExperienceCache("benchmark")
    spent = seconds(lambda: cache.load_state_dict(torch.load(folder / "cache.ckpt", weights_only=True)))
    return {
        "resume_us_per_entry": 1e6 * spent / count,
        "memory_resumed": memory.ratio(cache),
        "peak_resuming": memory.ratio(cache, "VmHWM"),
    }


def look_up(cache: ExperienceCache, uid: str) -> None:
    """Look a response up, down to its tokens."""
    entry = cache.get(uid)
    assert entry is not None
    assert entry.response is not None


def update(cache: ExperienceCache, chosen: list[str], generator: np.random.Generator) -> dict[str, float]:
    """Visit questions as training does: a request with a kept prefix, and the cache's part of its group."""
    served = CachedPrefixes(
        cache, FractionOfShortestCut(0.5), FullBudget(), EpsilonGreedyRefresh(0.5), response_limit=2 * LONGEST
    )  # fmt: skip
    requests, records = [], []
    for uid in chosen:
        prompt = Prompt(uid, "question", (1, 2, 3), "0")
        start = time.process_time()
        request = served.request(prompt)
        requests.append(time.process_time() - start)
        records.append(seconds(served.record, answered(request, generator)))
    return spread("request", requests) | spread("record", records) | {"record_max_ms": 1e3 * max(records)}


def answered(request: RolloutRequest, generator: np.random.Generator) -> Group:
    """Two suffixes, as long on average as what was cut."""
    completions, samples = [], []
    for _ in range(2):
        count = int(generator.integers(0, 2 * request.cut + 1)) + 1
        ids = tuple(generator.integers(0, VOCABULARY, count).tolist())
        completions.append(Completion(ids, (), True))
        samples.append(Sample("question", "", "0", len(request.prefix_ids) + count, True, 1.0))
    return Group(request, completions, samples, [0.0, 1.0], step=1)


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Mean and 99th percentile in microseconds."""
    return {f"{name}_us": 1e6 * float(np.mean(values)), f"{name}_p99_us": 1e6 * float(np.percentile(values, 99))}


def measure(count: int) -> dict[str, float]:
    """All figures of a size; every part in a process of its own."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("fill", "use", "resume"):
            command = [sys.executable, __file__, "--part", part, "--sizes", str(count), "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures |= json.loads(done.stdout.splitlines()[-1])
            print(part, figures, flush=True)
    return figures


def table(results: list[dict[str, float]]) -> str:
    """A Markdown table, a column per size."""
    rows = {**COLUMNS, **dict.fromkeys(MEMORY, "{:.3f}")}
    lines = [
        "| | " + " | ".join("{:,.0f}".format(r["entries"]) for r in results) + " |",
        "| --- " * (len(results) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(form.format(r[name]) for r in results) + " |" for name, form in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="10,000 and 50,000 questions")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cache_scale.json")
    parser.add_argument("--part", choices=["fill", "use", "resume"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        warm_up(arguments.folder)
        part = {"fill": fill, "use": use, "resume": resume}[arguments.part]
        print(json.dumps(part(arguments.sizes[0], arguments.folder)))
        return
    sizes = [10_000, 50_000] if arguments.quick else arguments.sizes
    results = [measure(count) for count in sizes]
    print(f"{hardware()}\n\n{table(results)}\n")
    record = {"hardware": hardware(), "setting": f"responses of {SHORTEST} to {LONGEST} tokens", "sizes": results}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
