"""TRL's side of ``versus_trl.py``; run by it, in the environment it makes for TRL.

``python -m common.trl_arm settings.json result.json``. Two modes: ``speed`` times steps with responses of a fixed
length; ``check`` makes one step with responses that end at common words, and notes them with its loss and
gradient norm, so that the other side can train on the very same responses.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from common.machine import peak_bytes
from common.text_reward import text_reward


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class NotingTrainer(GRPOTrainer):
    """Notes the first loss, and what it was computed on."""

    first: dict[str, Any] | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss, unchanged."""
        loss: torch.Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if self.first is None:
            lengths = inputs["completion_mask"].sum(1).tolist()
            rows = zip(inputs["completion_ids"].tolist(), lengths, strict=True)
            self.first = {
                "loss": loss.item(),
                "prompt_ids": [
                    [t for t, m in zip(ids, mask, strict=True) if m]
                    for ids, mask in zip(inputs["prompt_ids"].tolist(), inputs["prompt_mask"].tolist(), strict=True)
                ],
                "completion_ids": [ids[:n] for ids, n in rows],
                "advantages": inputs["advantages"].flatten().tolist(),
            }
        return loss


def reward(completions: list[str], **_: Any) -> list[float]:
    """The same number as on the other side."""
    return [text_reward(text) for text in completions]


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train; returns seconds per step after the first, peak memory, and the first loss."""
    check = settings["mode"] == "check"
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(settings["end_ids"][0])
    model.generation_config.eos_token_id = settings["end_ids"]
    batch = settings["questions"] * settings["group"]
    rows = batch if check else settings["rows"]
    arguments = GRPOConfig(
        output_dir=settings["folder"], per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows,
        num_generations=settings["group"],
        max_completion_length=settings["length"], max_steps=1 if check else settings["steps"], learning_rate=1e-6,
        optim="adamw_torch", weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=1.0, beta=0.0,
        epsilon=0.2, epsilon_high=0.28, loss_type="dapo", scale_rewards="none", bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", shuffle_dataset=False,
        temperature=1.0, disable_tqdm=True, seed=0, generation_kwargs={"min_new_tokens": settings["least"]},
    )  # fmt: skip
    clock = Clock()
    trainer = NotingTrainer(
        model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[clock],
        train_dataset=Dataset.from_dict({"prompt": settings["prompts"]}),
    )  # fmt: skip
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    steps = len(clock.ends) - 1
    return {
        "seconds": (clock.ends[-1] - clock.ends[0]) / steps if steps else None,
        "peak_bytes": peak_bytes(before),
        "first": trainer.first if check else None,
        "grad_norm": norms[0],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
