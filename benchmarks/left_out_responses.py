"""The update without responses that change no gradient, against one that computes all of them.

``python benchmarks/left_out_responses.py`` runs ``configs/quickstart.yaml``, whose reward is 0 or 1, with both, by
turns, one thread each. The gradient is the same to rounding; runs drift apart as rounding does. The ratio compares the
seconds of the update phase, and the tokens that it computes. The last line is JSON. ``--quick`` makes two updates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common.fitted import ROOT, fitted
from common.machine import hardware
from common.tables import table

ARMS = {"left out": [], "all computed": ["--model.objective=common.all_responses.DAPOOfAllResponses"]}


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """What is compared."""
    update = summary["phases"]["update"]
    return {
        "update_seconds": update["seconds"],
        "update_tokens": float(update["tokens"]),
        "seconds": summary["seconds"],
        "accuracy_after": summary["accuracy_after"],
    }


def main() -> None:
    """Run the arms by turns; report the ratio of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of two updates")
    args = parser.parse_args()
    rounds, updates = (1, ["--trainer.max_steps=2"]) if args.quick else (args.rounds, [])
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(rounds):
            for arm, overrides in ARMS.items():
                folder = Path(temporary) / arm.replace(" ", "_") / str(seed)
                options = [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", *updates, *overrides]
                found[arm].append(figures(fitted("configs/quickstart.yaml", options, folder, threads=1)))
    left_out, computed = (found[arm] for arm in ARMS)
    ratios = {
        name: [a[name] / b[name] for a, b in zip(left_out, computed, strict=True)]
        for name in ("update_tokens", "update_seconds", "seconds")
    }
    rows: list[dict[str, object]] = [
        {"ratio": name, "median": median(values), "range": (min(values), max(values))}
        for name, values in ratios.items()
    ]
    print(f"\n{hardware()}; {rounds} rounds, left out over all computed\n\n{table(rows)}\n", flush=True)
    record = {"hardware": hardware(), "rounds": rounds, "ratios": ratios, "arms": found}
    if not args.quick:
        out = ROOT / "benchmarks" / "results" / "left_out_responses.json"
        out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
