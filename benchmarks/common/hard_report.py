"""Tables and pictures of the runs of ``hard_questions.py``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.learning_report import interval, signed, spread

# Runs of an arm by seed.
Runs = dict[int, dict[str, Any]]
# Iterations of an epoch: 96 questions, 16 at a time.
EPOCH = 6
BASELINE = "full path"
MEASURES = {"accuracy": "held-out accuracy without a prefix", "pass@8": "held-out pass@8 without a prefix"}
AXES = {"decoded_tokens": ("decoded tokens, thousands", 1e3), "cpu_seconds": ("processor seconds", 1)}
HEAD = (
    "| arm | seeds | before | accuracy | pass@8 | accuracy − full path | informative | updates | decoded | processed | "
    "processor s | supervised updates |"
)


def write_report(runs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Print a table and draw a picture for every level; returns the figures of the tables."""
    figures = {}
    for level in dict.fromkeys(run["level"] for run in runs):
        arms: dict[str, Runs] = defaultdict(dict)
        for run in runs:
            if run["level"] == level:
                arms[run["arm"]][run["seed"]] = run
        figures[level] = {arm: figures_of(found, arms.get(BASELINE, {})) for arm, found in arms.items()}
        hardware = "; ".join(sorted({r["hardware"] for r in runs if r["level"] == level}))
        print(f"\nlevel {level}; {hardware}\n\n{HEAD}\n|{' --- |' * HEAD[1:].count('|')}")
        for name, arm in figures[level].items():
            print(line(name, arm))
        if level == "mixed":
            print("\n" + "\n".join(mixed_table(arms)))
        draw(arms, level, folder / f"hard_questions_{level}.png")
    return figures


def figures_of(runs: Runs, baseline: Runs) -> dict[str, Any]:
    """Ends of an arm's runs over seeds, with what supervised training took, and paired differences of accuracy."""
    ends = {seed: run["curve"][-1] for seed, run in runs.items()}
    supervised = [run["supervised"] or {"updates": 0, "processed_tokens": 0, "cpu_seconds": 0} for run in runs.values()]
    differences = [
        end["accuracy"] - baseline[seed]["curve"][-1]["accuracy"] for seed, end in ends.items() if seed in baseline
    ]
    return {
        "seeds": len(runs),
        "before": spread([run["curve"][0]["accuracy"] for run in runs.values()]),
        "pass@8 before": mean(run["curve"][0]["pass@8"] for run in runs.values()),
        **{name: spread([end[name] for end in ends.values()]) for name in ("accuracy", "pass@8", "update")},
        "difference": interval(differences) if differences else None,
        "informative_share": mean(informative_share(run) for run in runs.values()),
        "decoded_tokens": mean(end["decoded_tokens"] for end in ends.values()),
        **{
            name: mean(end[name] + s[name] for end, s in zip(ends.values(), supervised, strict=True))
            for name in ("processed_tokens", "cpu_seconds")
        },
        "supervised_updates": mean(s["updates"] for s in supervised),
    }


def informative_share(run: dict[str, Any]) -> float:
    """Mean share of groups with right and wrong members over the iterations."""
    return mean(iteration["informative_share"] for iteration in run["iterations"])


def line(name: str, arm: dict[str, Any]) -> str:
    """A line of the table."""
    shown = [f"{arm[c][0]:.3f} ± {arm[c][1]:.3f}" for c in ("before", "accuracy", "pass@8")]
    difference = "" if name == BASELINE else signed(arm["difference"])
    tokens = [f"{arm[c] / 1e3:,.0f}k" for c in ("decoded_tokens", "processed_tokens")]
    return (
        f"| {name} | {arm['seeds']} | {' | '.join(shown)} | {difference} | {arm['informative_share']:.2f} | "
        f"{arm['update'][0]:.0f} | {' | '.join(tokens)} | {arm['cpu_seconds']:.0f} | {arm['supervised_updates']:.0f} |"
    )


def mixed_table(arms: dict[str, Runs]) -> list[str]:
    """Groups without variance in the first epoch and after it, and accuracy by difficulty at the end."""
    some = next(iter(next(iter(arms.values())).values()))
    sets = sorted((k for k in some["curve"][-1] if k.endswith("/accuracy")), key=lambda k: int(k.split("_")[1][:-9]))
    names = " | ".join(s.removesuffix("/accuracy").replace("_", " ") for s in sets)
    lines = [f"| arm | without variance, first epoch | after it | {names} |", "|" + " --- |" * (3 + len(sets))]
    for name, runs in arms.items():
        first, after = (
            mean(iteration["zero_variance_share"] for run in runs.values() for iteration in run["iterations"][part])
            for part in (slice(0, EPOCH), slice(EPOCH, None))
        )
        ends = [f"{mean(run['curve'][-1][s] for run in runs.values()):.3f}" for s in sets]
        lines.append(f"| {name} | {first:.2f} | {after:.2f} | {' | '.join(ends)} |")
    return lines


def draw(arms: dict[str, Runs], level: str, path: Path) -> None:
    """Accuracy and pass@8 against decoded tokens and processor seconds; the band is a standard deviation over seeds."""
    figure, axes = plt.subplots(len(MEASURES), len(AXES), figsize=(13, 10), sharex="col", sharey="row", squeeze=False)
    colours = plt.get_cmap("tab10")
    for (measure, label), row in zip(MEASURES.items(), axes, strict=True):
        row[0].set_ylabel(label)
        for index, (name, runs) in enumerate(arms.items()):
            for axis, (key, (_, unit)) in zip(row, AXES.items(), strict=True):
                work, values = mean_curve(runs, key, measure)
                centre, width = values.mean(0), values.std(0, ddof=1 if len(values) > 1 else 0)
                style = "-" if "full path" in name else "--"
                axis.plot(work / unit, centre, style, color=colours(index), marker=".", label=f"{name} ({len(runs)})")
                axis.fill_between(work / unit, centre - width, centre + width, color=colours(index), alpha=0.08)
                axis.grid(alpha=0.3)
    for axis, (text, _) in zip(axes[-1], AXES.values(), strict=True):
        axis.set_xlabel(text)
    figure.suptitle(
        f"embedded task, level {level}: mean and standard deviation over seeds (number of seeds in brackets)"
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 0.98))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def mean_curve(runs: Runs, work: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure [runs, points] at equal parts of the mean work, between evaluations on the line that joins them.

    What supervised training took is added to the processor seconds.
    """
    starts = [(run["supervised"] or {}).get(work, 0.0) for run in runs.values()]
    curves = [[p[work] + start for p in run["curve"]] for run, start in zip(runs.values(), starts, strict=True)]
    at = np.linspace(mean(c[0] for c in curves), mean(c[-1] for c in curves), 5)
    values = [
        np.interp(at, c, [p[measure] for p in run["curve"]]) for c, run in zip(curves, runs.values(), strict=True)
    ]
    return at, np.array(values)
