"""What an iteration costs besides decoding and the forward and backward passes: seconds of the trainer's own code.

``python benchmarks/host_overhead.py`` (needs ``make smollm2`` for the tokenizer) runs whole iterations through
``Trainer.fit``: 96 questions x G = 6, prefixes of 2,543 tokens from a filled cache, suffixes of 146. The engine is a
stub (``common/stub_engine.py``) that sleeps for ``--decoding`` seconds while sequences end one after the other. The
policy is so small that it costs nothing, and its passes are not counted. Rewards are accuracy (by ``MathVerifier``),
form and length. One arm has answers with a closing tag and a box, the other answers without. Each is a process of its
own; figures are medians over the iterations after the first. What grading takes after decoding counts, what is hidden
behind decoding does not.

Texts are made up from templates, or from the answers in ``--data``, a JSON Lines file with ``question`` and ``answer``
as in GSM8K. The last line is JSON; ``--quick`` makes one small iteration, on the embedded reasoner's tokenizer if there
is no other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rpo_lightning.module as training_module
import rpo_lightning.rollout.policy_module as rollout_module
import rpo_lightning.update.loss as loss_module
from common.filled_cache import FilledCache
from common.machine import hardware
from common.parts import Parts
from common.stub_engine import StubEngine
from common.texts import Texts
from rpo_lightning import ExperienceCacheCallback, RPODataModule, RPOModule
from rpo_lightning.data.loader import ResumableLoader
from rpo_lightning.policy import output_head
from rpo_lightning.policy.tokenizer import Continuations, load_tokenizer
from rpo_lightning.rewards import AccuracyReward, FormatReward, GradingPool, MathVerifier, SoftOverlongPenalty
from rpo_lightning.rollout.groups import Scoring
from rpo_lightning.update.advantages import GroupScaled
from rpo_lightning.update.metrics import IterationRecord, UpdateMetrics
from rpo_lightning.update.mismatch import MismatchBound
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
ARMS = {"closed": "answers with a closing tag", "unclosed": "answers without"}
NOT_COUNTED = ("decoding (pretended)", "forward and backward")


class TextCache(FilledCache):
    """A cache that begins with a text for every question."""

    def __init__(self, responses: Sequence[list[int]], cut: int) -> None:
        super().__init__(len(responses[0]), cut)
        self._responses = [np.asarray(ids, np.int32) for ids in responses]

    def response(self, generator: np.random.Generator) -> np.ndarray:
        """One of the texts."""
        return self._responses[int(generator.integers(len(self._responses)))]


class Recorder(Callback):
    """Notes the parts of every iteration, and the processor time of trainer and workers."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.iterations: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Make the policy's passes cheap: the embedding alone, and a sum for log-probs."""
        policy, output_head._score = pl_module.policy, _cheap_scores

        def forward(input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=policy.get_output_embeddings()(policy.get_input_embeddings()(input_ids)))

        policy.forward = forward
        self.parts.watch("forward and backward", policy, "forward")
        self.parts.watch("forward and backward", pl_module, "manual_backward")
        self._cpu = (time.process_time(), _worker_seconds())
        self.parts.take()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note an iteration."""
        cpu, self._cpu = self._cpu, (time.process_time(), _worker_seconds())
        seconds, rest = self.parts.take()
        busy = {"trainer": self._cpu[0] - cpu[0], "workers": self._cpu[1] - cpu[1]}
        self.iterations.append({**seconds, "Lightning's loop": rest, **{f"processor, {k}": v for k, v in busy.items()}})


def _worker_seconds() -> float:
    times = [psutil.Process(child.pid).cpu_times() for child in active_children()]
    return sum(t.user + t.system for t in times)


def _cheap_scores(apply: Any, hidden_KH: Tensor, token_K: Tensor, targets: output_head.Targets) -> Tensor:
    logprobs_K = hidden_KH.float().sum(-1) * 1e-3 - 1.0
    return torch.stack([logprobs_K, logprobs_K.detach()])


def watch(parts: Parts) -> None:
    """Name the parts of an iteration."""
    loader = ResumableLoader.__iter__

    def batches(self: ResumableLoader) -> Iterator[Any]:
        iterator = loader(self)
        while True:
            with parts("questions"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    ResumableLoader.__iter__ = batches  # type: ignore[method-assign]
    parts.watch("decoding (pretended)", StubEngine, "generate")
    parts.watch("cut and prefixes", RPODataModule, "on_before_batch_transfer")
    parts.watch("requests", rollout_module, "generate")
    parts.watch("texts", Continuations, "text")
    parts.watch("submitting to graders", Scoring, "__init__", "add")
    parts.watch("waiting for grading", GradingPool, "collect")
    parts.watch("rewards in the trainer", Scoring, "groups")
    parts.watch("advantages", GroupScaled, "advantages")
    parts.watch("rows and micro-batches", loss_module, "rows_of", "shared_rows", "passes_of")
    parts.watch("layout", loss_module, "token_logprobs")
    parts.watch("loss", loss_module.PolicyLoss, "backward")
    parts.watch("metrics", training_module, "rollout_metrics", "rollout_tokens")
    parts.watch("metrics", UpdateMetrics, "add", "take")
    parts.watch("metrics", IterationRecord, "over", "logged")
    parts.watch("optimizer step", RPOModule, "_step")
    parts.watch("cache refresh", ExperienceCacheCallback, "on_train_batch_end")
    parts.watch("logging", RPOModule, "log", "log_dict")
    parts.watch("logging", CSVLogger, "log_metrics", "save")
    parts.watch("the rest of the step", RPOModule, "training_step")


def run(arm: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train some iterations; medians of the parts' seconds over all but the first."""
    torch.set_num_threads(1)  # where a GPU decodes, one thread works
    tokenizer = load_tokenizer(arguments.model)
    texts, parts = Texts(tokenizer, arguments.data, seed=0), Parts()
    endings = [texts.ending(arguments.suffix, arm == "closed") for _ in range(512)]
    responses = [texts.ids(arguments.prefix + arguments.suffix) for _ in range(64)]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=8192,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    limit = 2 * (arguments.prefix + arguments.suffix)
    module = RPOModule(
        policy, [AccuracyReward(), FormatReward(), SoftOverlongPenalty(limit, limit // 5)], tokenizer, MathVerifier(),
        engine=StubEngine(endings, arguments.decoding), group_size=arguments.group, max_response_tokens=limit,
        update=UpdateSettings(mismatch_bound=MismatchBound(1e9, 1e9, 1e9), max_idle_iterations=0),
        grading=GradingPool(arguments.workers),
    )  # fmt: skip
    questions = texts.questions(arguments.questions * (arguments.iterations + 1))
    data = RPODataModule(train=questions, batch_size=arguments.questions, use_chat_template=False)
    recorder = Recorder(parts)
    watch(parts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=arguments.iterations + 1, max_epochs=-1, logger=CSVLogger(folder), log_every_n_steps=1,
            callbacks=[TextCache(responses, arguments.suffix), recorder], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
            devices=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    measured = recorder.iterations[1:]
    parts_found = dict.fromkeys(part for iteration in measured for part in iteration)
    return {part: statistics.median(i.get(part, 0.0) for i in measured) for part in parts_found}


def counted(seconds: dict[str, float]) -> dict[str, float]:
    """The parts that make up the host's overhead."""
    return {k: v for k, v in seconds.items() if k not in NOT_COUNTED and not k.startswith("processor")}


def table(results: dict[str, dict[str, float]]) -> str:
    """A Markdown table."""
    of_any = {part: None for seconds in results.values() for part in counted(seconds)}
    others = {part: None for seconds in results.values() for part in seconds if part not in of_any}
    lines = ["| part | " + " | ".join(f"{ARMS[arm]}, s" for arm in results) + " |", "|" + " --- |" * (len(results) + 1)]
    for part in of_any:
        lines.append(f"| {part} | " + " | ".join(f"{s.get(part, 0.0):.3f}" for s in results.values()) + " |")
    totals = [sum(counted(seconds).values()) for seconds in results.values()]
    lines.append("| **all of these** | " + " | ".join(f"**{total:.3f}**" for total in totals) + " |")
    for part in others:
        lines.append(
            f"| not counted: {part} | " + " | ".join(f"{s.get(part, 0.0):.3f}" for s in results.values()) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the arms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = ROOT / "models" / "smollm2-135m-instruct"
    parser.add_argument("--model", default=str(model), help="whose tokenizer is used")
    parser.add_argument("--data", type=Path, help="JSON Lines with question and answer")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--prefix", type=int, default=2543)
    parser.add_argument("--suffix", type=int, default=146)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--decoding", type=float, default=4.0, help="seconds that decoding is pretended to take")
    parser.add_argument("--workers", type=int, default=max(len(os.sched_getaffinity(0)) - 1, 1))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="one iteration of 8 questions, prefixes of 256 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "host_overhead.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.questions, arguments.prefix, arguments.suffix = 8, 256, 32
        arguments.iterations, arguments.decoding = 1, 0.5
        if arguments.model == str(model) and not model.exists():
            arguments.model = "embedded:arithmetic-reasoner"
    results = {}
    for arm in arguments.arms:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[arm] = process.submit(run, arm, arguments).result()
    setting = (
        f"{arguments.questions} x G = {arguments.group}, {arguments.prefix} + {arguments.suffix} tokens, tokenizer of "
        f"{Path(arguments.model).name}, {arguments.workers} grading process(es), decoding pretended to take "
        f"{arguments.decoding} s, medians of {arguments.iterations} iterations"
    )
    print(f"\n{hardware()}; {setting}\n\n{table(results)}\n")
    record: dict[str, Any] = {"hardware": hardware(), "setting": setting}
    for arm, seconds in results.items():
        record[arm] = {"seconds": sum(counted(seconds).values()), "parts": seconds}
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
