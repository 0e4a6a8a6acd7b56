"""Cuts that follow success, traces and supervised training, where the policy solves little of its questions.

``python benchmarks/hard_questions.py`` runs every arm of ``ARMS`` on three levels of the embedded task: reasoners in
``reasoners/`` that solve about 0.3, 0.07 and 0.04 of their problems, chains of 12 operations. Every run decodes as many
tokens. Arms with traces have a correct solution of each training question, in the policy's own style or in a foreign
one. "Supervised" arms are trained on the traces first: that costs no decoding and is charged as updates, processed
tokens and processor seconds. A set of mixed lengths has arms of its own (``MIXED_ARMS``).

Answers to held-out questions are sampled at T = 1 without a prefix, eight to a question. Runs are appended to
``hard_questions.jsonl`` as they end and are not repeated: the script can be stopped and called again. ``--report``
makes the tables and pictures of what is there. ``--quick`` makes two short runs and keeps nothing. Seconds are
processor seconds of a one-thread process, evaluations excluded. The last line is JSON.

The reasoners were made with ``python -m rpo_lightning.cli.scripts.make_reasoner --bfloat16 --out FOLDER`` and::

    --start rpo_lightning/policy/arithmetic_reasoner --operations 12 --success 0.07 --foreign 0.25 --updates 300
    --start THAT --operations 12 --success P --foreign 0.35 --updates 200
    --start rpo_lightning/policy/arithmetic_reasoner --operations 24 --also 6 12 18 --success 0.06 --updates 200

The first one is only a start. ``P`` is 0.28 for level 0.3, 0.035 for 0.07 and 0.008 for 0.02, which came out at 0.04.
The third is that of the mixed set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.forked import in_folder, results_of
from common.hard_report import write_report
from common.machine import hardware
from common.supervised import imitate
from rpo_lightning.data.arithmetic import ArithmeticChain

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "hard_questions.jsonl"
OPERATIONS, QUESTIONS, PROBLEMS = 12, 96, 64
MIXED_OPERATIONS = [6, 12, 18, 24]
SUPERVISED = {"updates": 48, "batch_size": 32, "lr": 1e-4}


@dataclass(frozen=True)
class Level:
    """A reasoner and its runs.

    Attributes:
        policy: Folder in ``reasoners/``.
        longest: Tokens of a response at most.
        decoded_tokens: Of a run.
        seeds: Of each arm.
    """

    policy: str
    longest: int = 160
    decoded_tokens: int = 150_000
    seeds: int = 5


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        overrides: Of ``configs/quickstart.yaml``.
        traces: The style of the traces that the cache starts from; empty for none.
        supervised: The style of the traces that the policy imitates before; empty for none.
    """

    overrides: list[str] = field(default_factory=list)
    traces: str = ""
    supervised: str = ""


LEVELS = {
    "0.3": Level("solves-30", seeds=3),
    "0.07": Level("solves-07"),
    "0.02": Level("solves-02"),
    "mixed": Level("solves-mixed", longest=300, decoded_tokens=300_000, seeds=3),
}
FULL_PATH = ["--cache=null"]
DYNAMIC = ["--model.dynamic_sampling=DynamicSampling"]
TARGET = ["--cache.cut=TargetSuccessCut"]
ARMS = {
    "full path": Arm(FULL_PATH),
    "full path, dynamic sampling": Arm([*FULL_PATH, *DYNAMIC]),
    "anchored": Arm(),
    "target success": Arm(TARGET),
    "target success, own-style traces": Arm(TARGET, traces="own"),
    "target success, foreign traces": Arm([*TARGET, "--cache.step_end=(?:[a-z])"], traces="foreign"),
    "supervised on own style, full path": Arm(FULL_PATH, supervised="own"),
    "supervised on own style, target success": Arm(TARGET, traces="own", supervised="own"),
    "supervised on foreign style, full path": Arm(FULL_PATH, supervised="foreign"),
    "supervised on foreign style, target success": Arm(TARGET, traces="foreign", supervised="foreign"),
}
ANCHORS = ["--cache.refresh=AnchorsRefresh", "--cache.refresh.correct=1", "--cache.refresh.wrong=1"]
MIXED_ARMS = {
    **{name: ARMS[name] for name in ("full path", "full path, dynamic sampling", "anchored", "target success")},
    "target success, failing prefixes": Arm([*TARGET, *ANCHORS, "--cache.cut.failing_prefixes=true"]),
}


def arms_of(level: str) -> dict[str, Arm]:
    """The arms of a level."""
    return MIXED_ARMS if level == "mixed" else ARMS


def traces(seed: int, style: str) -> list[tuple[str, str]]:
    """A correct solution of each training question."""
    problems = ArithmeticChain(QUESTIONS, OPERATIONS, seed).problems()
    return [(p.question, p.solution(foreign_steps=OPERATIONS if style == "foreign" else 0)) for p in problems]


def questions_of(level: str, seed: int, problems: int) -> list[str]:
    """Arguments that name the questions of a run."""
    if level != "mixed":
        return [
            "--data.train=ArithmeticChain", f"--data.train.size={QUESTIONS}", f"--data.train.operations={OPERATIONS}",
            f"--data.train.seed={seed}", "--data.val=ArithmeticChain", f"--data.val.size={problems}",
            f"--data.val.operations={OPERATIONS}", "--data.val.seed=2",
        ]  # fmt: skip
    train = {
        "class_path": "common.mixed_chains.MixedChains",
        "init_args": {"size": QUESTIONS, "operations": MIXED_OPERATIONS, "seed": seed},
    }
    held_out = {
        f"operations_{n}": {
            "class_path": "ArithmeticChain",
            "init_args": {"size": problems // len(MIXED_OPERATIONS), "operations": n, "seed": 2},
        }
        for n in MIXED_OPERATIONS
    }
    return [f"--data.train={json.dumps(train)}", f"--data.val={json.dumps(held_out)}"]


def run(level: str, arm: str, seed: int, decoded_tokens: int, problems: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    chains, way = LEVELS[level], arms_of(level)[arm]
    policy = str(ROOT / "benchmarks" / "reasoners" / chains.policy)
    train_seed = 100 + seed
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        supervised = None
        if way.supervised:
            out = folder / "imitator"
            supervised = imitate(policy, traces(train_seed, way.supervised), **SUPERVISED, seed=seed, out=out)  # type: ignore[arg-type]
            policy = str(out)
        recorder = {
            "class_path": "common.budgeted_run.BudgetedRun",
            "init_args": {"path": f"{folder}/run.json", "decoded_tokens": decoded_tokens},
        }
        common = [
            f"--config={ROOT}/configs/quickstart.yaml", f"--model.policy={policy}", f"--seed_everything={seed}",
            f"--model.max_response_tokens={chains.longest}", *questions_of(level, train_seed, problems),
        ]  # fmt: skip
        fit = [
            "fit", *common, "--model.evaluation.samples=8", "--data.eval_batch_size=64",
            "--model.engine=TransformersEngine", "--model.engine.max_sequences=512",
            "--trainer.max_steps=100000", "--trainer.enable_progress_bar=false",
            f"--trainer.val_check_interval={6 if '--cache=null' in way.overrides else 30}",
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.callbacks=[{json.dumps(recorder)}]",
            "--completions.every_n_batches=100000", *way.overrides,
        ]  # fmt: skip
        commands = [fit]
        if way.traces:
            rows = [{"question": q, "response": r} for q, r in traces(train_seed, way.traces)]
            (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            imported = ["cache", "import", *common, f"--path={folder}/traces.jsonl", f"--out={folder}/traces.parquet"]
            commands = [[*imported, "--only_correct=true"], [*fit, f"--cache.path={folder}/traces.parquet"]]
        try:
            in_folder(folder, *commands)
        except SystemExit as error:
            raise RuntimeError((folder / "output.txt").read_text()[-2000:]) from error
        recorded = json.loads((folder / "run.json").read_text())
    return {
        "level": level, "arm": arm, "seed": seed, "hardware": hardware(), "supervised": supervised, **recorded,
    }  # fmt: skip


def recorded_runs() -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def run_missing(levels: list[str], arms: list[str] | None, seeds: int | None, processes: int) -> None:
    """Run what has not been run yet, first seeds first."""
    there = {(r["level"], r["arm"], r["seed"]) for r in recorded_runs()}
    tasks = [
        (level, arm, seed, LEVELS[level].decoded_tokens, PROBLEMS)
        for seed in range(max(LEVELS[level].seeds for level in levels))
        for level in levels
        if seed < (seeds or LEVELS[level].seeds)
        for arm in arms_of(level)
        if (level, arm, seed) not in there and (arms is None or arm in arms)
    ]
    for result in results_of(tasks, run, processes):
        with RUNS.open("ab", buffering=0) as file:
            file.write((json.dumps(result) + "\n").encode())
        last = result["curve"][-1]
        print(f"{result['level']}, {result['arm']}, seed {result['seed']}: {last}", flush=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--arms", nargs="+", metavar="ARM")
    parser.add_argument("--seeds", type=int, help="fewer or more than the level has")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="two short runs, nothing is kept")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if arguments.quick:
        arms = ("full path", "supervised on foreign style, target success")
        runs = list(results_of([("0.07", arm, 0, 25_000, 16) for arm in arms], run, 1))
        folder = Path(tempfile.mkdtemp())
    else:
        if not arguments.report:
            run_missing(arguments.level, arguments.arms, arguments.seeds, arguments.processes)
        runs, folder = recorded_runs(), ROOT / "benchmarks" / "results"
    figures = write_report(runs, folder)
    print(json.dumps({"hardware": "; ".join(sorted({r["hardware"] for r in runs})), "levels": figures}))


if __name__ == "__main__":
    main()
