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
from typing import Any

from common.fitted import ROOT, fitted
from common.machine import hardware
from common.tables import arm_rows, table

CONFIG = "configs/word_problems_smollm2.yaml"
ARMS = {"RPO": [], "full path": ["--cache=null"]}
COLUMNS = ("accuracy_before", "accuracy_after", "decoded_tokens_per_sample", "seconds")


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
                save_dir = folder / arm.replace(" ", "_") / str(seed)
                results[arm].append(fitted(CONFIG, options, save_dir, quiet=False))
                report = {
                    "hardware": hardware(),
                    "config": CONFIG,
                    "arms": {a: {"overrides": ARMS[a], "runs": runs} for a, runs in results.items()},
                }
                ended = {a: runs for a, runs in results.items() if runs}
                print(f"\n{hardware()}\n\n{table(arm_rows(ended, COLUMNS))}\n", flush=True)
                if not args.quick:
                    path = ROOT / "benchmarks" / "results" / "word_problems.json"
                    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
