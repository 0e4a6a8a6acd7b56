"""Supervised training on traces: the arm that prefixes of the same traces are compared with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rpo_lightning.policy.export import save_policy
from rpo_lightning.policy.load import load_policy, resolve_policy
from rpo_lightning.policy.tokenizer import load_tokenizer


def imitate(
    policy: str, traces: list[tuple[str, str]], updates: int, batch_size: int, lr: float, seed: int, out: Path
) -> dict[str, float]:
    """Train on traces as a whole, with a loss on each of their tokens, and save the result.

    Args:
        policy: Folder of the starting policy.
        traces: Questions and solutions. Epochs are shuffled.
        updates: Of AdamW, without weight decay.
        batch_size: Traces of an update.
        lr: Constant.
        seed: Of the order.
        out: Folder that the policy is saved to.

    Returns:
        What it took: ``updates``, ``processed_tokens``, ``cpu_seconds`` of this process.
    """
    started = time.process_time()
    folder = resolve_policy(policy)
    tokenizer, model = load_tokenizer(folder), cast(Any, load_policy(folder))
    rows = []
    for question, solution in traces:
        prompt = tokenizer(question)["input_ids"]
        response = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((torch.tensor(prompt + response), torch.tensor([-100] * len(prompt) + response)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    epochs = -(-updates * batch_size // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(epochs)])
    processed = 0
    model.train()
    for batch in order[: updates * batch_size].reshape(updates, batch_size):
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([rows[i][part] for i in batch], batch_first=True, padding_value=value)
            for part, value in ((0, tokenizer.pad_token_id), (1, -100))
        )
        mask = ids != tokenizer.pad_token_id
        processed += int(mask.sum())
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_policy(model, tokenizer, out)
    return {"updates": updates, "processed_tokens": processed, "cpu_seconds": time.process_time() - started}
