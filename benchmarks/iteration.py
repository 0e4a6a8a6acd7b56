"""A whole iteration: the full path, RPO, and RPO with a row per response, on vLLM.

``python benchmarks/iteration.py`` trains SmolLM2-135M (``make smollm2``) through ``Trainer.fit`` on the same
questions (prompts of 64 tokens) with G = 6: full-path responses of 1,024 tokens, and RPO that keeps all but
64 tokens of such responses; every size is an option. ``rpo_plain_rows`` is the published way, in which every
response is trained on with its whole prefix. On a CPU rows of their own pass one by one in the update, which is
faster than several at once. Each arm is a process of its own. Seconds and tokens of every phase are means over the
iterations after the first.
The cache is filled by hand: its cost is one full path a question and not part of an iteration.

On a GPU the update's operations (``work.py``; nothing recomputed is counted) and the bytes that decoding
reads are set beside what the GPU reaches at best, and the ratios beside those that a model of operations and bytes
allows (``cost_model.py``). The last line is JSON; ``--quick`` shortens responses to 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_model import Gpu, Setting, on_one_gpu
from lightning.pytorch import Callback, Trainer

from common.endless import load_endless
from common.filled_cache import FilledCache
from common.machine import ceilings, hardware
from common.work import ModelWork
from rpo_lightning import RPODataModule, RPOModule, VLLMEngine
from rpo_lightning.core.timing import PHASES
from rpo_lightning.rewards import ExactMatchVerifier, UniformRandomReward
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
ARMS = ("full", "rpo", "rpo_plain_rows")


class Recorder(Callback):
    """Notes every iteration's phases."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Note seconds and tokens."""
        self.iterations.append({"seconds": pl_module.record.phase_seconds, "tokens": pl_module.record.phase_tokens})


def run(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some iterations of one arm; means over all but the first."""
    policy, tokenizer = load_endless(arguments.model)
    work = ModelWork.of(policy)
    generator = np.random.default_rng(1)
    count = arguments.questions * (arguments.iterations + 1)
    ids = generator.integers(100, 40_000, (count, arguments.prompt))
    recorder, on_gpu = Recorder(), torch.cuda.is_available()
    one_row = arguments.length + 2 * arguments.prompt
    budget = arguments.micro_batch_tokens if arm == "rpo" or on_gpu else min(one_row, arguments.micro_batch_tokens)
    module = RPOModule(
        policy, [UniformRandomReward()], tokenizer, ExactMatchVerifier(), engine=VLLMEngine(**arguments.engine),
        group_size=arguments.group, max_response_tokens=arguments.length,
        elementwise_kernels=arguments.elementwise_kernels,
        update=UpdateSettings(
            share_prefixes=arm != "rpo_plain_rows", micro_batch_tokens=budget,
            gradient_checkpointing=arguments.gradient_checkpointing,
        ),
    )  # fmt: skip
    data = RPODataModule(
        train=[{"question": tokenizer.decode(row.tolist()), "answer": "0"} for row in ids],
        batch_size=arguments.questions, use_chat_template=False,
    )  # fmt: skip
    cache = [] if arm == "full" else [FilledCache(arguments.length, arguments.suffix)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=arguments.iterations + 1, max_epochs=-1, callbacks=[*cache, recorder], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            precision="bf16-mixed" if on_gpu else "32-true", devices=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    measured = recorder.iterations[1:]

    def mean(kind: str, phase: str) -> float:
        return sum(i[kind].get(phase, 0) for i in measured) / len(measured)

    seconds = {p: mean("seconds", p) for p in PHASES if any(p in i["seconds"] for i in measured)}
    tokens = {p: mean("tokens", p) for p in ("prefill", "decode", "update")}
    suffix = arguments.length if arm == "full" else arguments.suffix
    context = arguments.prompt + arguments.length - suffix
    operations = arguments.questions * work.update(context, suffix, arguments.group, arm != "rpo_plain_rows")
    read = work.decoding(context, suffix, arguments.questions * arguments.group, 2 if on_gpu else 4)
    return {
        "seconds": sum(seconds.values()), "phases": seconds, "tokens": tokens,
        "each": [sum(i["seconds"].values()) for i in measured], "work": asdict(work),
        "update_tflops": operations / seconds["update"] / 1e12, "decode_gbytes_per_s": read / seconds["decode"] / 1e9,
    }  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    phases = [p for p in PHASES if any(p in result["phases"] for result in results.values())]
    head = ["arm", "decoded tokens", "tokens in the update", "seconds", *phases, "update TFLOP/s", "decode GB/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for arm, result in results.items():
        cells = [f"{result['tokens']['decode']:,.0f}", f"{result['tokens']['update']:,.0f}", f"{result['seconds']:.2f}"]
        cells += [f"{result['phases'].get(p, 0.0):.2f}" for p in phases]
        cells += [f"{result['update_tflops']:.3g}", f"{result['decode_gbytes_per_s']:.3g}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def allowed(lengths: Setting, work: ModelWork) -> dict[str, dict[str, float]]:
    """What this GPU reaches at best, and the ratios that follow from it on paper."""
    best = ceilings()
    gpu = Gpu(torch.cuda.get_device_name(), best["bf16_tflops"] * 1e12, best["copy_gbytes_per_s"] * 1e9)
    return {"ceilings": best, "allowed": on_one_gpu(gpu, work, lengths)}


def main() -> None:
    """Run the arms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--suffix", type=int, default=64)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384 if on_gpu else 8192)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--elementwise-kernels", choices=["auto", "liger", "none"], default="auto")
    parser.add_argument("--engine", type=json.loads, default={}, help="VLLMEngine's settings as JSON")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="responses of 256 tokens, one iteration")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "iteration.json")
    arguments = parser.parse_args()
    arguments.length = 256 if arguments.quick else arguments.length
    arguments.iterations = 1 if arguments.quick else arguments.iterations
    results = {}
    for arm in arguments.arms:
        # In a process of its own: a GPU's memory is free again after it, and vLLM sleeps once a process.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[arm] = process.submit(run, arm, arguments).result()
        print(f"{arm}: {results[arm]}", flush=True)
    setting = (
        f"{Path(arguments.model).name}, {arguments.prompt} + {arguments.length} tokens, suffixes of "
        f"{arguments.suffix}, {arguments.questions} x G = {arguments.group}, passes of "
        f"{arguments.micro_batch_tokens} tokens"
        f"{', gradient checkpointing' if arguments.gradient_checkpointing else ''}"
    )
    print(f"\n{hardware()}; {setting}\n\n{table(results)}\n")
    lengths = Setting(arguments.prompt, arguments.length, arguments.suffix, arguments.group, arguments.questions)
    record: dict[str, Any] = {"hardware": hardware(), "setting": setting, "lengths": asdict(lengths), **results}
    if {"full", "rpo"} <= results.keys():
        record["ratio"] = results["full"]["seconds"] / results["rpo"]["seconds"]
        print(f"full path over RPO: {record['ratio']:.2f}\n")
    if on_gpu:
        work = ModelWork(**results[arguments.arms[0]]["work"])
        record |= allowed(lengths, work)
        print(f"the GPU's best: {record['ceilings']}\nratios that it allows: {record['allowed']}\n")
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
