"""Learning curves of full-path RL and RPO on the embedded task, at three lengths of the chain of thought.

``python benchmarks/learning.py --length 200`` runs every arm of ``ARMS`` with five seeds (three at 400 and 800
tokens) on ``configs/quickstart.yaml``, each run in a process of one thread. Arms differ in the overrides listed
alone. Answers to held-out questions are sampled at T = 1 without a prefix, four to a question, every ten
iterations (a run with dynamic sampling makes fewer updates). Runs are appended to ``learning.jsonl`` as they end and
are not repeated, so that the script can be stopped and called again; ``--report`` makes the tables and pictures of
what is there. ``--quick`` runs two arms for two updates and keeps nothing.

Longer chains have reasoners of their own in ``reasoners/``, made from the shorter ones with ``python -m
rpo_lightning.cli.scripts.make_reasoner --operations 50 --start FOLDER --out FOLDER --bfloat16``. At 800 tokens a run
has half as many updates and half as many questions, so that it visits each as often.
"Seconds" are processor seconds of a one-thread process, filling the cache included, evaluations excluded: other runs
at the same time disturb them less than the clock. Runs of one length and seed start from the same evaluation, which
only the first of them makes (on one machine it would be the same to the digit). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.learning_report import write_report
from common.machine import hardware

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "learning.jsonl"
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class Length:
    """Chains of about as many tokens.

    Attributes:
        policy: The reasoner that they are asked of.
        operations: Of a problem.
        longest: Tokens of a response at most.
        seeds: Runs of an arm.
        updates: Of a run.
        questions: To train on.
        at_once: Answers that are sampled together at most.
    """

    policy: str
    operations: int
    longest: int
    seeds: int
    updates: int
    questions: int
    at_once: int

    @property
    def name(self) -> str:
        """Of the reasoner, as it stands in the records."""
        return self.policy.rpartition("/")[2].removeprefix("embedded:")


LENGTHS = {
    200: Length("embedded:arithmetic-reasoner", 24, 320, 5, 40, 192, 512),
    400: Length(str(ROOT / "benchmarks" / "reasoners" / "operations-50"), 50, 670, 3, 40, 192, 128),
    800: Length(str(ROOT / "benchmarks" / "reasoners" / "operations-100"), 100, 1340, 3, 20, 96, 128),
}

FULL_PATH = ["--cache=null"]
LENGTH_AWARE = ['--model.rewards=[{"class_path": "LengthAwareAccuracyReward"}]']
PAPER = ["--cache.cut=FractionOfShortestCut", "--cache.refresh=EpsilonGreedyRefresh", "--cache.initialisation=eager"]
OBJECTIVE = ["--model.objective=GRPO"]
CAPPED = [*OBJECTIVE, *FULL_PATH, "--model.max_response_tokens={quarter}"]
DAPO = ["--model.dynamic_sampling=DynamicSampling"]


def shape(questions: int, group: int) -> list[str]:
    """Another division of a batch into questions and members."""
    return [f"--data.batch_size={questions}", f"--model.group_size={group}"]


BASIC: dict[str, list[str]] = {
    "GRPO, full path": [*OBJECTIVE, *FULL_PATH],
    "RPO, budget m (published code)": [
        *OBJECTIVE, *PAPER, "--cache.budget=CutPlusSlackBudget", "--cache.budget.slack=1",
        "--cache.keep_unfinished=true",
    ],
    "RPO, free budget": [*OBJECTIVE, *PAPER, "--cache.budget=FullBudget"],
    "RPO, anchored": OBJECTIVE,
}  # fmt: skip
ARMS: dict[str, list[str]] = {
    **BASIC,
    **{f"{name}, length-aware": [*overrides, *LENGTH_AWARE] for name, overrides in BASIC.items()},
    "GRPO, full path, five updates": [
        *OBJECTIVE,
        *FULL_PATH,
        "--trainer.max_steps=5",
        "--trainer.val_check_interval=5",
    ],
    "RPO, free budget, three times the updates": [
        *BASIC["RPO, free budget"],
        "--trainer.max_steps={thrice}",
        "--trainer.val_check_interval=20",
    ],
    "GRPO, full path capped at a quarter": CAPPED,
    "GRPO, full path capped at a quarter, length-aware": [*CAPPED, *LENGTH_AWARE],
    "DAPO, full path": [*DAPO, *FULL_PATH],
    "DAPO, RPO anchored": DAPO,
    "GRPO, full path, 32 x 4": [*OBJECTIVE, *FULL_PATH, *shape(32, 4)],
    "GRPO, full path, 8 x 16": [*OBJECTIVE, *FULL_PATH, *shape(8, 16)],
    "RPO, anchored, 32 x 4": [*OBJECTIVE, *shape(32, 4)],
    "RPO, anchored, prefix without gradient": [*OBJECTIVE, "--model.update.prefix_gradient=false"],
}


def run(length: int, arm: str, seed: int, updates: int, problems: int, shares_start: bool = True) -> dict[str, Any]:
    """One run in a process of its own."""
    chains = LENGTHS[length]
    quarter = str(chains.longest // 4)
    start = known_start(length, seed) if shares_start and "capped" not in arm else []
    with tempfile.TemporaryDirectory() as folder:
        recorder = {"class_path": "common.learning_curve.CurveRecorder", "init_args": {"path": f"{folder}/curve.json"}}
        command = [
            sys.executable, "-m", "rpo_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml",
            f"--model.policy={chains.policy}", f"--model.max_response_tokens={chains.longest}",
            "--model.evaluation.samples=4",
            f"--data.train.size={chains.questions}", f"--data.train.operations={chains.operations}",
            f"--data.val.operations={chains.operations}", f"--data.val.size={problems}",
            "--model.engine=TransformersEngine", f"--model.engine.max_sequences={chains.at_once}",
            f"--seed_everything={seed}", f"--trainer.max_steps={updates}", "--trainer.enable_progress_bar=false",
            f"--trainer.num_sanity_val_steps={0 if start else -1}", f"--trainer.val_check_interval={EVALUATE_EVERY}",
            f"--trainer.logger.init_args.save_dir={folder}",
            f"--trainer.callbacks=[{json.dumps(recorder)}]", "--completions.every_n_batches=1000",
            *(o.replace("{quarter}", quarter).replace("{thrice}", str(3 * updates)) for o in ARMS[arm]),
        ]  # fmt: skip
        paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])  # this tree's package, whatever is installed
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{arm}, seed {seed}: failed\n{done.stderr[-2000:]}")
        curve = start + json.loads((Path(folder) / "curve.json").read_text())
    return {
        "length": length, "policy": chains.name, "arm": arm, "seed": seed, "hardware": hardware(), "curve": curve,
    }  # fmt: skip


def recorded() -> list[dict[str, Any]]:
    """The runs so far that started from the present reasoners."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return [r for r in runs if r["policy"] == LENGTHS[r["length"]].name]


def known_start(length: int, seed: int) -> list[dict[str, float]]:
    """What the starting policy answers, from an earlier run whose responses may be as long; empty if there is none."""
    runs = [r for r in recorded() if (r["length"], r["seed"]) == (length, seed) and "capped" not in r["arm"]]
    return runs[0]["curve"][:1] if runs else []


def run_missing(lengths: list[int], arms: list[str], processes: int) -> None:
    """Run what has not been run yet, first seeds first."""
    there = {(r["length"], r["arm"], r["seed"]) for r in recorded()}
    for length in lengths:
        seeds = range(LENGTHS[length].seeds)
        wanted = [(length, arm, seed) for seed in seeds for arm in arms if (length, arm, seed) not in there]
        with ThreadPoolExecutor(processes) as pool:
            for future in [pool.submit(run, *key, LENGTHS[length].updates, 128) for key in wanted]:
                result = future.result()
                with RUNS.open("ab", buffering=0) as file:  # at once: another call may be reading
                    file.write((json.dumps(result) + "\n").encode())
                last = result["curve"][-1]
                print(f"{result['length']} tokens, {result['arm']}, seed {result['seed']}: {last}", flush=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="two arms, two updates, nothing is kept")
    arguments = parser.parse_args()
    if arguments.quick:
        runs = [run(min(LENGTHS), arm, 0, 2, 16, shares_start=False) for arm in ("GRPO, full path", "RPO, anchored")]
        folder = Path(tempfile.mkdtemp())
    else:
        if not arguments.report:
            run_missing(arguments.length, arguments.arms, arguments.processes)
        runs, folder = recorded(), ROOT / "benchmarks" / "results"
    figures = write_report(runs, folder)
    print(json.dumps({"hardware": "; ".join(sorted({r["hardware"] for r in runs})), "arms": figures}))


if __name__ == "__main__":
    main()
