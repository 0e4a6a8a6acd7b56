"""RPO, the full path and a random-reward control on the embedded task, several seeds each.

``python benchmarks/quickstart_arms.py`` runs every arm with the settings of ``configs/quickstart.yaml``
and writes ``quickstart_arms.json`` and a table; the last line printed is the JSON. ``--quick`` runs one
seed and few updates, to see that it works. Arms differ in the overrides listed in ``ARMS`` alone, so
they share questions, updates, groups and optimiser, not decoded tokens: compare accuracies together
with the token columns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from common.fitted import ROOT, fitted
from common.machine import hardware

PAPER_CUT = [
    "--cache.cut=FractionOfShortestCut", "--cache.refresh=EpsilonGreedyRefresh", "--cache.initialisation=eager",
    "--cache.budget=FullBudget",
]  # fmt: skip
ARMS = {
    "RPO anchored (quickstart)": [],
    "RPO paper's cut": PAPER_CUT,
    "full path": ["--cache=null"],
    "random reward, full path": ["--cache=null", '--model.rewards=[{"class_path": "UniformRandomReward"}]'],
}
COLUMNS = ("accuracy_before", "accuracy_after", "decoded_tokens_per_sample", "total_tokens", "seconds")


def run(arm: str, seed: int, updates: int, folder: Path) -> dict[str, float]:
    """Run one arm with one seed in a process of its own; returns its summary."""
    options = [
        f"--seed_everything={seed}",
        f"--trainer.max_steps={updates}",
        "--trainer.enable_progress_bar=false",
        *ARMS[arm],
    ]
    save_dir = folder / arm.replace(" ", "_").replace("'", "") / str(seed)
    result: dict[str, float] = fitted("configs/quickstart.yaml", options, save_dir, threads=1)
    print(f"{arm}, seed {seed}: {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f}", flush=True)
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table, mean ± standard deviation over seeds."""
    lines = ["| arm | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for arm, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in runs]
            digits = 3 if "accuracy" in column else 0
            spread = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):,.{digits}f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms, each run in a process of one thread; report after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, two updates")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON; nowhere with --quick")
    args = parser.parse_args()
    seeds, updates = (1, 2) if args.quick else (args.seeds, args.updates)
    out = args.out or (None if args.quick else ROOT / "benchmarks" / "results" / "quickstart_arms.json")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.processes) as pool:
        futures = {
            (arm, seed): pool.submit(run, arm, seed, updates, Path(temporary))
            for seed in range(seeds)
            for arm in args.arms
        }
        for done in range(1, seeds + 1):
            results = {arm: [futures[arm, seed].result() for seed in range(done)] for arm in args.arms}
            report = {
                "hardware": hardware(),
                "processes_at_once": args.processes,
                "updates": updates,
                "seeds": done,
                "arms": {arm: {"overrides": ARMS[arm], "runs": runs} for arm, runs in results.items()},
            }
            conditions = f"{updates} updates, {done} seed(s), {args.processes} one-thread processes at once"
            print(f"\n{report['hardware']}; {conditions}\n\n{table(results)}\n", flush=True)
            if out is not None:
                out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
