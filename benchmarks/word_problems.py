"""RPO and the full path with a pretrained model on a CPU: SmolLM2-135M-Instruct on word problems, run by run.

``python benchmarks/word_problems.py`` runs every arm and seed with ``configs/word_problems_smollm2.yaml`` on all cores.
Runs are kept in ``--folder``: what has ended is not run again, and a run that was stopped goes on from its checkpoint.
After each run the table is printed and ``results/word_problems.json`` is written. ``--quick`` makes two updates of each
arm and writes no file.

Both arms make as many updates, so read accuracy together with seconds and decoded tokens. Accuracy is on held-out
problems, answered without a prefix.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from common.fitted import ROOT, fitted
from common.machine import hardware
from common.tables import table

CONFIG = "configs/word_problems_smollm2.yaml"
ARMS = {"RPO": [], "full path": ["--cache=null"]}
COLUMNS = ("accuracy_before", "accuracy_after", "decoded_tokens_per_sample", "seconds")


def rows(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    """A row of the table for each arm: means, and the lowest and highest of several seeds."""
    found: list[dict[str, object]] = []
    for arm, runs in results.items():
        row: dict[str, object] = {"arm": arm, "seeds": len(runs)}
        for column in COLUMNS:
            values = [float(r[column]) for r in runs]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            row[column] = f"{mean(values):.2f}{spread}"
        found.append(row)
    return found


def main() -> None:
    """Run the arms; report after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "word_problems_arms", help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, two updates")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, updates, seeds = args.folder.resolve(), [], args.seeds
        if args.quick:
            folder, updates, seeds = Path(temporary), ["--trainer.max_steps=2"], 1
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for seed in range(seeds):
            for arm in ARMS:
                options = [f"--seed_everything={seed}", *updates, *ARMS[arm]]
                results[arm].append(fitted(CONFIG, options, folder / arm.replace(" ", "_") / str(seed)))
                report = {
                    "hardware": hardware(),
                    "config": CONFIG,
                    "arms": {a: {"overrides": ARMS[a], "runs": runs} for a, runs in results.items()},
                }
                print(f"\n{hardware()}\n\n{table(rows({a: r for a, r in results.items() if r}))}\n", flush=True)
                if not args.quick:
                    path = ROOT / "benchmarks" / "results" / "word_problems.json"
                    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
