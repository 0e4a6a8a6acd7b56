"""A whole iteration: the full path, RPO, and RPO with a row per response, on vLLM.

``python benchmarks/iteration.py`` trains SmolLM2-135M (``make smollm2``) through ``Trainer.fit`` on the same
questions (prompts of 64 tokens) with G = 6: full-path responses of 1,024 tokens, and RPO that keeps all but
64 tokens of such responses. ``rpo_plain_rows`` is the published way, in which every response is trained
on with its whole prefix. On a CPU rows of their own pass one by one in the update, which is faster than several at
once. Seconds and tokens of every phase are means over the iterations after the first.
The cache is filled by hand: its cost is one full path a question and not part of an iteration. The last
line is JSON; ``--quick`` shortens responses to 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endless import load_endless
from filled_cache import FilledCache
from lightning.pytorch import Callback, Trainer
from machine import hardware

from rpo_lightning import RPODataModule, RPOModule, VLLMEngine
from rpo_lightning.rewards import ExactMatchVerifier, UniformRandomReward
from rpo_lightning.timing import PHASES

ROOT = Path(__file__).parents[1]
PROMPT, GROUP = 64, 6
ARMS = ("full", "rpo", "rpo_plain_rows")


class Recorder(Callback):
    """Notes every iteration's phases."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Note seconds and tokens."""
        self.iterations.append({"seconds": pl_module.record.phase_seconds, "tokens": pl_module.record.phase_tokens})


def run(arm: str, arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """Train some iterations of one arm; means over all but the first."""
    policy, tokenizer = load_endless(arguments.model)
    generator = np.random.default_rng(1)
    count = arguments.questions * (arguments.iterations + 1)
    words = [tokenizer.decode(generator.integers(100, 40_000, PROMPT).tolist()) for _ in range(count)]
    recorder = Recorder()
    plain = arguments.micro_batch_tokens if torch.cuda.is_available() else length + 2 * PROMPT
    module = RPOModule(
        policy, [UniformRandomReward()], tokenizer, ExactMatchVerifier(), engine=VLLMEngine(), group_size=GROUP,
        max_response_tokens=length, share_prefixes=arm != "rpo_plain_rows",
        micro_batch_tokens=arguments.micro_batch_tokens if arm == "rpo" else min(plain, arguments.micro_batch_tokens),
    )  # fmt: skip
    data = RPODataModule(
        train=[{"question": w, "answer": "0"} for w in words], batch_size=arguments.questions, use_chat_template=False
    )
    cache = [] if arm == "full" else [FilledCache(length, arguments.suffix)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=arguments.iterations + 1, max_epochs=-1, callbacks=[*cache, recorder], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true", devices=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    measured = recorder.iterations[1:]

    def mean(kind: str, phase: str) -> float:
        return sum(i[kind].get(phase, 0) for i in measured) / len(measured)

    seconds = {p: mean("seconds", p) for p in PHASES if any(p in i["seconds"] for i in measured)}
    tokens = {p: mean("tokens", p) for p in ("prefill", "decode", "update")}
    return {"seconds": sum(seconds.values()), "phases": seconds, "tokens": tokens}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    phases = list(results["full"]["phases"])
    phases += [p for p in results["rpo"]["phases"] if p not in phases]
    head = ["arm", "decoded tokens", "tokens in the update", "seconds", *phases]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for arm, result in results.items():
        cells = [f"{result['tokens']['decode']:,.0f}", f"{result['tokens']['update']:,.0f}", f"{result['seconds']:.2f}"]
        cells += [f"{result['phases'].get(p, 0.0):.2f}" for p in phases]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--suffix", type=int, default=64)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384 if torch.cuda.is_available() else 8192)
    parser.add_argument("--quick", action="store_true", help="responses of 256 tokens, one iteration")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "iteration.json")
    arguments = parser.parse_args()
    length = 256 if arguments.quick else arguments.length
    arguments.iterations = 1 if arguments.quick else arguments.iterations
    results = {}
    for arm in ARMS:
        results[arm] = run(arm, arguments, length)
        print(f"{arm}: {results[arm]}", flush=True)
    setting = f"{length} tokens, suffixes of {arguments.suffix}, {arguments.questions} x G = {GROUP}"
    ratio = results["full"]["seconds"] / results["rpo"]["seconds"]
    print(f"\n{hardware()}; {setting}\n\n{table(results)}\n\nfull path over RPO: {ratio:.2f}\n")
    record = {"hardware": hardware(), "setting": setting, **results, "ratio": ratio}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
