"""Tables and pictures of the runs of ``learning.py``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Curves by seed.
Curves = dict[int, list[dict[str, float]]]
# What an arm is compared with, by the objective that its name begins with.
BASELINES = {"GRPO": "GRPO, full path", "RPO": "GRPO, full path", "DAPO": "DAPO, full path"}
MEASURES = {"accuracy": "held-out accuracy without a prefix", "pass@4": "held-out pass@4 without a prefix"}
# The first updates of the same runs, evaluated in between.
BEGINNINGS = {"GRPO, full path": "GRPO, full path, five updates"}
AXES = {
    "update": ("updates", 1),
    "decoded_tokens": ("decoded tokens, thousands", 1e3),
    "processed_tokens": ("processed tokens, thousands", 1e3),
    "cpu_seconds": ("processor seconds", 1),
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def write_report(runs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Print a table and draw a picture for every length; returns the figures of the tables."""
    figures = {}
    for length in sorted({r["length"] for r in runs}):
        arms: dict[str, Curves] = defaultdict(dict)
        for run in runs:
            if run["length"] == length:
                arms[run["arm"]][run["seed"]] = run["curve"]
        figures[str(length)] = {arm: figures_of(curves, baseline_of(arm, arms)) for arm, curves in arms.items()}
        hardware = sorted({r["hardware"] for r in runs if r["length"] == length})
        print(f"\nabout {length} tokens; {'; '.join(hardware)}\n\n{table(figures[str(length)])}\n")
        draw(arms, f"embedded task, chains of about {length} tokens", folder / f"learning_{length}.png")
    return figures


def baseline_of(arm: str, arms: dict[str, Curves]) -> Curves:
    """What an arm is compared with, with every point that was evaluated."""
    name = BASELINES[arm.partition(",")[0]]
    beginnings = arms.get(BEGINNINGS.get(name, ""), {})
    merged = {}
    for seed, curve in arms.get(name, {}).items():
        points = {p["update"]: p for p in [*beginnings.get(seed, []), *curve]}
        merged[seed] = [points[update] for update in sorted(points)]
    return merged


def figures_of(curves: Curves, baseline: Curves) -> dict[str, Any]:
    """Ends of an arm's curves over seeds, and paired differences of accuracy from the baseline.

    The baseline is taken at its end, and where it had decoded and processed as many tokens as the arm at its end
    (between two evaluations on the line that joins them).
    """
    ends = {seed: curve[-1] for seed, curve in curves.items()}
    paired = {
        "difference": [e["accuracy"] - baseline[seed][-1]["accuracy"] for seed, e in ends.items() if seed in baseline],
        **{
            f"at_equal_{work}": [
                e["accuracy"] - reached(baseline[seed], work, e[work]) for seed, e in ends.items() if seed in baseline
            ]
            for work in ("decoded_tokens", "processed_tokens")
        },
    }
    names = ("accuracy", "pass@4", "decoded_tokens", "processed_tokens", "cpu_seconds")
    return {
        "seeds": len(ends),
        "before": mean(curve[0]["accuracy"] for curve in curves.values()),
        **{name: spread([end[name] for end in ends.values()]) for name in names},
        **{name: interval(differences) for name, differences in paired.items()},
    }


def reached(curve: list[dict[str, float]], work: str, amount: float) -> float:
    """Accuracy of a run after an amount of work; after all of it if it did less."""
    return float(np.interp(amount, [p[work] for p in curve], [p["accuracy"] for p in curve]))


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def interval(differences: list[float]) -> tuple[float, float | None] | None:
    """Mean, and half the width of its 95 % interval."""
    if not differences:
        return None
    count = len(differences)
    return mean(differences), STUDENT[count - 1] * stdev(differences) / count**0.5 if 1 < count <= 5 else None


def table(arms: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, mean ± standard deviation over seeds, differences ± half the width of an interval."""
    lines = [
        "| arm | seeds | accuracy | pass@4 | decoded tokens | processed tokens | processor s | "
        "accuracy − full path | at equal decoded | at equal processed |",
        "|" + " --- |" * 10,
    ]
    for name, arm in arms.items():
        thousands = [f"{arm[c][0] / 1e3:,.0f}k" for c in ("decoded_tokens", "processed_tokens")]
        cells = [f"{arm[c][0]:.3f} ± {arm[c][1]:.3f}" for c in ("accuracy", "pass@4")]
        compared = (
            [] if name in BASELINES.values() else ["difference", "at_equal_decoded_tokens", "at_equal_processed_tokens"]
        )
        differences = [signed(arm[c]) for c in compared] or [""] * 3
        lines.append(
            f"| {name} | {arm['seeds']} | {' | '.join(cells)} | {' | '.join(thousands)} | "
            f"{arm['cpu_seconds'][0]:.0f} | {' | '.join(differences)} |"
        )
    return "\n".join(lines)


def signed(difference: tuple[float, float | None] | None) -> str:
    """A difference as a table shows it."""
    if difference is None:
        return ""
    return f"{difference[0]:+.3f}" + (f" ± {difference[1]:.3f}" if difference[1] is not None else "")


def draw(arms: dict[str, Curves], title: str, path: Path) -> None:
    """Accuracy and pass@4 against every measure of work; the band is a standard deviation over seeds.

    Arms that never answered right would squeeze the others: they are named instead.
    """
    flat = [name for name, curves in arms.items() if not any(p["accuracy"] for c in curves.values() for p in c)]
    arms = {name: curves for name, curves in arms.items() if name not in flat}
    figure, axes = plt.subplots(len(MEASURES), len(AXES), figsize=(18, 11), sharex="col", sharey="row")
    for (measure, label), row in zip(MEASURES.items(), axes, strict=True):
        draw_measure(arms, measure, row)
        row[0].set_ylabel(label)
    for axis, (label, _) in zip(axes[-1], AXES.values(), strict=True):
        axis.set_xlabel(label)
    not_drawn = f"\nzero throughout: {'; '.join(flat)}" if flat else ""
    figure.suptitle(f"{title}: mean and standard deviation over seeds (number of seeds in brackets){not_drawn}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 0.98))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_measure(arms: dict[str, Curves], measure: str, axes: Any) -> None:
    """One measure of what a policy knows, against every measure of work."""
    colours = plt.get_cmap("tab10" if len(arms) <= 10 else "tab20")
    for index, (name, curves) in enumerate(arms.items()):
        points = min(len(curve) for curve in curves.values())
        values = np.array([[p[measure] for p in curve[:points]] for curve in curves.values()])
        centre, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else values.std(0)
        style = "-" if "full path" in name else "--"
        for axis, (key, (_, unit)) in zip(axes, AXES.items(), strict=True):
            work = np.array([[p[key] for p in curve[:points]] for curve in curves.values()]).mean(0) / unit
            axis.plot(work, centre, style, color=colours(index), marker=".", label=f"{name} ({len(curves)})")
            axis.fill_between(work, centre - spread, centre + spread, color=colours(index), alpha=0.08, linewidth=0)
            axis.grid(alpha=0.3)
