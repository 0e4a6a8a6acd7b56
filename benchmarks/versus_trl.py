"""The same training in TRL's GRPOTrainer and here: seconds per step, peak memory, and the same first loss.

``python benchmarks/versus_trl.py`` (needs ``make smollm2``) makes an environment with TRL's newest release
and the torch and transformers of ``constraints.txt``, and trains SmolLM2-135M in fp32 on the same questions with
the same G, response length, loss (DAPO's token mean), optimizer and no gradient checkpointing: TRL with its
transformers generation; rpo-lightning's full path and RPO, which keeps all but ``--suffix`` tokens, each on
``TransformersEngine`` and on vLLM, which runs on CPUs here too. rpo-lightning trains on ``--rows`` responses in
one pass (as a budget of tokens), TRL on its whole batch, as it does by default, and in a second arm on as few. Each
arm is a process of its own. Seconds are means over the steps after the first; memory is what the process held at
most beyond its imports: weights, gradients, optimizer state, activations, and vLLM with its copy of the weights.

Before that, both make one step on the same responses (TRL's own, of different lengths): loss and gradient
norm must agree. The last line is JSON. ``--quick`` takes responses of 64 tokens and two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lightning.pytorch import Callback, Trainer

from common.filled_cache import FilledCache
from common.machine import hardware, peak_bytes
from common.text_reward import text_reward
from rpo_lightning import RPODataModule, RPOModule
from rpo_lightning.core.types import Completion
from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rewards import ExactMatchVerifier, FunctionReward
from rpo_lightning.rollout.engine import EngineSetup, GenerationRequest, OnFinished, RolloutEngine, Sampling
from rpo_lightning.rollout.transformers.engine import TransformersEngine
from rpo_lightning.rollout.vllm.engine import VLLMEngine
from rpo_lightning.update.advantages import Unscaled
from rpo_lightning.update.settings import UpdateSettings

ROOT = Path(__file__).parents[1]
PROMPT = 64
OURS = (
    ("rpo-lightning, full path", "full", "transformers"),
    ("rpo-lightning, full path on vLLM", "full", "vllm"),
    ("rpo-lightning, RPO", "rpo", "transformers"),
    ("rpo-lightning, RPO on vLLM", "rpo", "vllm"),
)
# Hardly ever sampled: responses have the length that is measured. And common words, to end at.
NEVER, COMMON = [3], [28, 30, 284, 198]


class ReplayEngine(RolloutEngine):
    """Answers with responses that were sampled elsewhere."""

    def __init__(self, responses: dict[tuple[int, ...], list[list[int]]]) -> None:
        super().__init__()
        self.responses = responses

    def attach(self, policy: Any, tokenizer: Any, context: EngineSetup = EngineSetup()) -> None:
        """Nothing to bind."""

    def _copy_weights(self, policy: Any) -> None:
        """Nothing to copy."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        seed: int,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """The responses of each prompt."""
        return [
            [Completion(tuple(ids), (0.0,) * len(ids), True) for ids in self.responses[request.token_ids]]
            for request in requests
        ]

    def logprob_caveat(self, sampling: Sampling) -> str:
        """Log-probs of the sampling policy are not replayed."""
        return "responses are replayed without log-probs"

    def prefill_share(self) -> float:
        """Nothing is computed."""
        return 0.0


class Clock(Callback):
    """Notes when steps end, and the first step's metrics."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.first: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        if not self.first:
            self.first = {k: float(v) for k, v in trainer.callback_metrics.items()}


def reward(prompt: str, response: str, answer: str) -> float:
    """The same number as on TRL's side."""
    return text_reward(response)


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one arm in this process."""
    before = psutil.Process().memory_info().rss
    check = settings["mode"] == "check"
    policy: Any = load_policy(settings["model"])
    tokenizer: Any = load_tokenizer(settings["model"])
    policy.float()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(settings["end_ids"][0])
    policy.generation_config.eos_token_id = settings["end_ids"]
    engine: RolloutEngine = VLLMEngine() if settings.get("engine") == "vllm" else TransformersEngine()
    if check:
        replies: dict[tuple[int, ...], list[list[int]]] = {}
        for prompt_ids, ids in zip(settings["prompt_ids"], settings["completion_ids"], strict=True):
            replies.setdefault(tuple(prompt_ids), []).append(ids)
        engine = ReplayEngine(replies)
    module = RPOModule(
        policy, [FunctionReward("versus_trl.reward")], tokenizer, ExactMatchVerifier(), engine=engine,
        group_size=settings["group"], max_response_tokens=settings["length"],
        update=UpdateSettings(
            advantages=Unscaled(),
            micro_batch_tokens=settings["rows"] * (PROMPT + PROMPT // 2 + settings["length"]),
        ),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
    )  # fmt: skip
    data = RPODataModule(
        train=[{"question": text, "answer": "0"} for text in settings["prompts"]],
        batch_size=settings["questions"], use_chat_template=False,
    )  # fmt: skip
    cache = [FilledCache(settings["length"], settings["suffix"])] if settings["arm"] == "rpo" else []
    clock = Clock()
    trainer = Trainer(
        max_steps=1 if check else settings["steps"], max_epochs=-1, callbacks=[*cache, clock], logger=False, devices=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=settings["folder"],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    steps = len(clock.ends) - 1
    return {
        "seconds": (clock.ends[-1] - clock.ends[0]) / steps if steps else None,
        "peak_bytes": peak_bytes(before),
        "loss": clock.first["loss/total"],
        "grad_norm": clock.first["loss/grad_norm"],
    }


def run(python: Path, script: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an arm in a process of its own."""
    given, result = folder / "settings.json", folder / "result.json"
    given.write_text(json.dumps({**settings, "folder": str(folder)}))
    command = [str(python), "-m", script, *(["--arm"] if script == "versus_trl" else [])]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    done = subprocess.run([*command, str(given), str(result)], cwd=ROOT / "benchmarks", capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script}: failed\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def make_environment(folder: Path) -> Path:
    """An environment with TRL's newest release; returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = str(ROOT / "constraints.txt")
    packages = ["trl", "torch", "transformers", "accelerate", "psutil"]
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--upgrade", "-c", constraints, *packages], check=True)
    return python


def compare_first_step(trl: Path, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """One step of each on the same responses."""
    settings = {**settings, "mode": "check", "arm": "full", "end_ids": COMMON, "least": 4}
    theirs = run(trl, "common.trl_arm", settings, folder)
    same = {key: theirs["first"][key] for key in ("prompt_ids", "completion_ids")}
    ours = run(Path(sys.executable), "versus_trl", {**settings, **same}, folder)
    lengths = [len(ids) for ids in same["completion_ids"]]
    return {
        "trl_loss": theirs["first"]["loss"],
        "loss": ours["loss"],
        "first_loss_diff": abs(theirs["first"]["loss"] - ours["loss"]),
        "trl_grad_norm": theirs["grad_norm"],
        "grad_norm": ours["grad_norm"],
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def table(arms: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| arm | seconds per step | peak memory, GB |", "| --- | --- | --- |"]
    lines += [f"| {name} | {arm['seconds']:.2f} | {arm['peak_bytes'] / 1e9:.2f} |" for name, arm in arms.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the check, then the arms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-trl", help="where TRL is installed")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--suffix", type=int, default=64)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2, help="responses in one forward and backward pass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="responses of 64 tokens, two steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "versus_trl.json")
    arguments = parser.parse_args()
    length, suffix, steps = (64, 16, 2) if arguments.quick else (arguments.length, arguments.suffix, arguments.steps)
    trl = make_environment(arguments.environment)
    generator = np.random.default_rng(1)
    tokenizer = load_tokenizer(arguments.model)
    count = arguments.questions * steps
    settings: dict[str, Any] = {
        "mode": "speed", "model": arguments.model, "questions": arguments.questions, "group": arguments.group,
        "length": length, "suffix": suffix, "steps": steps, "end_ids": NEVER, "least": length, "rows": arguments.rows,
        "prompts": [tokenizer.decode(generator.integers(100, 40_000, PROMPT).tolist()) for _ in range(count)],
    }  # fmt: skip
    here = Path(sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = compare_first_step(trl, settings, folder)
        print(first, flush=True)
        whole = arguments.questions * arguments.group
        arms = {
            name: run(trl, "common.trl_arm", {**settings, "arm": "trl", "rows": rows}, folder)
            for name, rows in (("TRL", whole), (f"TRL, {arguments.rows} rows a pass", arguments.rows))
        }
        for name, arm, engine in OURS:
            arms[name] = run(here, "versus_trl", {**settings, "arm": arm, "engine": engine}, folder)
    version = subprocess.run(
        [str(trl), "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True, check=True
    )
    theirs, in_parts, full, full_on_vllm, rpo, rpo_on_vllm = arms.values()
    shape = f"{arguments.questions} x G = {arguments.group}, {length} tokens, suffixes of {suffix}, fp32"
    setting = f"TRL {version.stdout.strip()}; {shape}"
    record = {
        "hardware": hardware(), "setting": setting, "first_step": first, "first_loss_diff": first["first_loss_diff"],
        "arms": {n: {k: arm[k] for k in ("seconds", "peak_bytes")} for n, arm in arms.items()},
        "time_ratio_full": theirs["seconds"] / full["seconds"], "time_ratio_rpo": theirs["seconds"] / rpo["seconds"],
        "time_ratio_full_vllm": theirs["seconds"] / full_on_vllm["seconds"],
        "time_ratio_rpo_vllm": theirs["seconds"] / rpo_on_vllm["seconds"],
        "memory_ratio_full": full["peak_bytes"] / theirs["peak_bytes"],
        "time_ratio_full_equal_rows": in_parts["seconds"] / full["seconds"],
        "memory_ratio_full_equal_rows": full["peak_bytes"] / in_parts["peak_bytes"],
    }  # fmt: skip
    print(f"\n{record['hardware']}; {setting}\n\n{table(arms)}\n")
    if not arguments.quick:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        Path(sys.argv[3]).write_text(json.dumps(train(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
