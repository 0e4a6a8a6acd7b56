"""Question selection against asking every question once an epoch, where questions differ in difficulty.

``python benchmarks/question_selection.py`` runs ``configs/quickstart.yaml`` on the full path with dynamic sampling,
where half of the questions are beyond the policy: problems of 24 steps, which the embedded reasoner half knows, and of
12 steps, of which it solves none. It does so with and without ``data.selection: InformativeSelection``, by turns, one
thread each. Both arms make as many updates of groups with right and wrong members. They differ in the responses that
they draw for them. In the first epoch both ask every question once, in different orders. Accuracy is on problems of 24
steps. The last line is JSON. ``--quick`` makes two updates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from common.fitted import ROOT, fitted
from common.machine import hardware
from common.tables import arm_rows, table

QUESTIONS = {
    "class_path": "common.mixed_chains.MixedChains",
    "init_args": {"size": 192, "operations": [24, 12], "seed": 1},
}
SETTINGS = [
    "--cache=null",
    "--model.dynamic_sampling={max_refills: 8}",
    f"--data.train={json.dumps(QUESTIONS)}",
    "--trainer.enable_progress_bar=false",
]
ARMS = {"every question once": [], "InformativeSelection": ["--data.selection=InformativeSelection"]}
COLUMNS = ("samples", "decoded_tokens", "informative_share", "accuracy_before", "accuracy_after", "seconds")


def figures(arm: str, seed: int, updates: int, folder: Path) -> dict[str, float]:
    """The figures of a run."""
    save_dir = folder / arm.replace(" ", "_") / str(seed)
    options = [*SETTINGS, f"--seed_everything={seed}", f"--trainer.max_steps={updates}", *ARMS[arm]]
    summary: dict[str, Any] = fitted("configs/quickstart.yaml", options, save_dir, threads=1)
    (log,) = save_dir.glob("*/*/metrics.csv")
    informative = pd.read_csv(log)["rollout/informative_share"].dropna().mean()
    return {name: float({**summary, "informative_share": informative}[name]) for name in COLUMNS}


def main() -> None:
    """Run the arms by turns; report after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one seed, two updates")
    args = parser.parse_args()
    seeds, updates = (1, 2) if args.quick else (args.seeds, args.updates)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(seeds):
            for arm in ARMS:
                found[arm].append(figures(arm, seed, updates, Path(temporary)))
            print(f"\n{hardware()}; {updates} updates\n\n{table(arm_rows(found, COLUMNS))}\n", flush=True)
            record = {"hardware": hardware(), "updates": updates, "settings": SETTINGS, "arms": found}
            if not args.quick:
                out = ROOT / "benchmarks" / "results" / "question_selection.json"
                out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
