"""Compares what two runs left, bit by bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

# By step and name; a step that was made again has its values twice.
Metrics = dict[int, dict[str, set[float]]]

# Metrics that are times, or that depend on them.
_TIMES = ("time/", "rollout/tokens_per_second", "seconds")


def difference(whole: Path, stopped: Path, ranks: int = 1) -> str | None:
    """What a run that was stopped and resumed has otherwise than the whole one, in a sentence; ``None`` if nothing."""
    for rank in range(ranks):
        final = [torch.load(folder / f"final-{rank}.pt", weights_only=False) for folder in (whole, stopped)]
        for name in final[0]:
            if not _equal(final[0][name], final[1][name]):
                return f"rank {rank} ends with another {name}"
        expected, found = (_iterations(folder / f"iterations-{rank}.jsonl") for folder in (whole, stopped))
        if expected.keys() != found.keys():
            return f"rank {rank} made iterations {sorted(found)}"
        for number, lines in found.items():
            if any(line != expected[number][0] for line in lines):
                return f"rank {rank}'s iteration {number} is another one"
    return _different_metrics(_metrics(whole), _metrics(stopped))


def _iterations(path: Path) -> dict[int, list[dict[str, Any]]]:
    """The lines of each iteration, which may have been made again."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["iteration"], []).append(row)
    return found


def _metrics(folder: Path) -> Metrics:
    """All values of each metric at each step, over the run and those that resumed it."""
    found: Metrics = {}
    for path in folder.glob("runs/x/version_*/metrics.csv"):
        for row in pd.read_csv(path).to_dict("records"):
            at_step = found.setdefault(int(row["step"]), {})
            for name, value in row.items():
                if not math.isnan(value) and not str(name).startswith(_TIMES):
                    at_step.setdefault(str(name), set()).add(value)
    return found


def _different_metrics(whole: Metrics, stopped: Metrics) -> str | None:
    if whole.keys() != stopped.keys():
        return f"metrics of steps {sorted(stopped)}, not of {sorted(whole)}"
    for step, metrics in whole.items():
        for name in {*metrics, *stopped[step]}:
            if metrics.get(name) != stopped[step].get(name):
                return f"{name} of step {step} is {stopped[step].get(name)}, not {metrics.get(name)}"
    return None


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return bool(torch.equal(first, second))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
