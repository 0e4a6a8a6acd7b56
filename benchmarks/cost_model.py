"""What an iteration should take, from floating-point operations and bytes; on paper, not measured.

``python benchmarks/cost_model.py`` predicts iterations with the paper's settings (DeepSeek-R1-Distill-Qwen
1.5B and 7B, G = 6, 576 samples, the lengths of its Table 2) on H20 and H100 GPUs and sets the ratio of full
path to RPO beside its Table 3. It divides an update into matrix products, attention and elementwise work, and says
what changes of the package are expected to bring on an H100. Then it checks itself against ``iteration.json``: from the
rates that the full path reached there, RPO's iterations are predicted, with shared rows and with a row per response.

The model: a matrix product costs two operations a weight and token, three times that to train, four times
with gradient checkpointing; elementwise work moves the bytes that ``common/traffic.py`` counts; decoding reads the
weights and the key–value cache once a step; prompts and prefixes are prefilled once a group. Efficiencies are assumed,
and said so in the output. The paper's baseline has one of eight GPUs sample while seven train, one after the other; its
hours contain more than these phases. The last line is JSON; its ``hardware`` is the machine that the script ran on, of
which the predictions know nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.expected import CONTEXT, GROUP, MICRO_BATCH, SUFFIX, changes, iteration
from common.machine import hardware
from common.predicted import (
    ATTENTION_EFFICIENCY,
    BANDWIDTH_EFFICIENCY,
    H20,
    H100,
    H200,
    PREFILL_EFFICIENCY,
    PRODUCT_EFFICIENCY,
    Gpu,
    Model,
    Rows,
)
from common.tables import table
from common.work import ModelWork

ROOT = Path(__file__).parents[1]
SAMPLES, PROMPT, CONCURRENT = 576, 150, 256


@dataclass(frozen=True)
class Published:
    """A model of the paper: average lengths (Table 2), and how many times as fast RPO was (Table 3, L = 800)."""

    name: str
    size: str
    full_length: float
    suffixes: tuple[tuple[int, float], ...]  # (L, generated tokens)
    ratio: float


PUBLISHED = (
    Published("1.5B", "qwen2-1.5b", 2689.5, ((300, 145.9), (500, 158.4), (800, 382.2)), 9.2),
    Published("7B", "qwen2-7b", 2457.9, ((300, 147.1), (500, 168.2), (800, 397.9)), 3.6),
)


def predict(gpu: Gpu, model: Model, prefix: float, suffix: float, shared: bool, samplers: int, trainers: int) -> float:
    """Seconds of an iteration of ``SAMPLES`` responses of ``prefix`` kept and ``suffix`` sampled tokens."""
    groups = SAMPLES / GROUP
    context = PROMPT + prefix
    prefill = 2 * model.work.matrices * groups * context / (gpu.flops * PREFILL_EFFICIENCY * samplers)
    concurrent = min(CONCURRENT, SAMPLES / samplers)
    read = 2 * (model.weights + concurrent * (context + suffix / 2) * model.work.cache)
    step = max(gpu.moving(read), 2 * model.weights * concurrent / (gpu.flops * PREFILL_EFFICIENCY))
    decode = step * SAMPLES * suffix / (concurrent * samplers)
    rows = Rows(context, suffix, GROUP, 1 if shared else GROUP)
    passes = rows.tokens * groups / MICRO_BATCH / trainers
    return prefill + decode + model.update(gpu, rows, groups / trainers, passes).total


def paper_settings(models: dict[str, Model]) -> list[dict[str, object]]:
    """Full path over RPO for every model, GPU, L and arrangement of eight GPUs."""
    rows: list[dict[str, object]] = []
    for paper in PUBLISHED:
        model, length = models[paper.size], paper.full_length
        for gpu in (H20, H100):
            for arrangement, samplers, trainers in (("1 samples, 7 train", 1, 7), ("8 do both", 8, 8)):
                full, shared_full = (
                    predict(gpu, model, 0, length, share, samplers, trainers) for share in (False, True)
                )
                for limit, suffix in paper.suffixes:
                    plain, shared = (
                        predict(gpu, model, length - suffix, suffix, share, samplers, trainers)
                        for share in (False, True)
                    )
                    rows.append({
                        "model": paper.name, "gpu": gpu.name, "gpus": arrangement, "L": limit, "full_seconds": full,
                        "rpo_plain_seconds": plain, "rpo_seconds": shared, "ratio_plain": full / plain,
                        "ratio_shared": shared_full / shared, "published_ratio": paper.ratio if limit == 800 else None,
                    })  # fmt: skip
    return rows


def update_shares(models: dict[str, Model]) -> list[dict[str, object]]:
    """A pass of four groups at the paper's lengths (L = 300) on an H100, in its parts."""
    rows: list[dict[str, object]] = []
    for size, model in models.items():
        for kernels in ("plain", "fused"):
            for checkpointing in (True, False):
                shape = Rows(CONTEXT, SUFFIX, GROUP, 1)
                update = model.update(H100, shape, 4, 1, kernels == "fused", checkpointing)
                rows.append({
                    "model": size, "kernels": kernels, "checkpointing": checkpointing, **asdict(update),
                    "seconds": update.total, "elementwise_share": update.elementwise / update.total,
                })  # fmt: skip
    return rows


def iterations(models: dict[str, Model]) -> list[dict[str, object]]:
    """Phases of the iteration of ``common/expected.py``; elementwise work is a part of the update."""
    return [{"model": size, **iteration(H100, model)} for size, model in models.items()]


def expected_gains(models: dict[str, Model]) -> list[dict[str, object]]:
    """What each change is expected to bring in the iteration of ``common/expected.py`` on an H100."""
    rows: list[dict[str, object]] = []
    for size, model in models.items():
        for change in changes(H100, model):
            rows.append({
                "change": change.name, "model": size, "before": change.before, "after": change.after,
                "saved": change.saved(), "applies": change.applies, "assumption": change.assumption,
            })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Setting:
    """Lengths and sizes of an iteration: tokens of a prompt, of a whole response and of what RPO samples of it."""

    prompt: int
    length: int
    suffix: int
    group: int
    questions: int


def on_one_gpu(gpu: Gpu, work: ModelWork, setting: Setting) -> dict[str, float]:
    """Ratios that one GPU allows, which trains and prefills at half its peak and decodes at its memory's speed.

    Returns:
        Seconds of the full path over those of RPO, with shared rows and with a row per response.
    """
    rate, sequences = gpu.flops / 2, setting.questions * setting.group

    def seconds(suffix: int, share: bool) -> float:
        context = setting.prompt + setting.length - suffix
        operations = work.prefill(context) + work.update(context, suffix, setting.group, share)
        return setting.questions * operations / rate + work.decoding(context, suffix, sequences) / gpu.bandwidth

    full, rpo, plain = seconds(setting.length, True), seconds(setting.suffix, True), seconds(setting.suffix, False)
    return {"full_over_rpo": full / rpo, "full_over_rpo_plain_rows": full / plain, "plain_over_shared": plain / rpo}


def one_gpu_settings(models: dict[str, Model]) -> list[dict[str, object]]:
    """What one GPU allows with the paper's lengths at L = 300: 150 + 2543 + 146 tokens, 16 questions at a time."""
    rows: list[dict[str, object]] = []
    for size, model in models.items():
        for gpu, group in ((H100, 6), (H100, 16), (H200, 6), (H200, 16)):
            ratios = on_one_gpu(gpu, model.work, Setting(PROMPT, 2689, 146, group, 16))
            rows.append({"model": size, "gpu": gpu.name, "G": group, **ratios})
    return rows


def check(record: dict[str, Any]) -> dict[str, Any]:
    """Predict RPO's iterations in ``iteration.json`` from the full path's alone, and compare the ratios.

    The rates are those that the full path reached: operations of its update (a prefill is taken to run at the same),
    bytes of its decoding. What else it took, a sync above all, RPO takes too.
    """
    full, setting = record["full"], Setting(**record["lengths"])
    work = ModelWork(**full["work"])
    prompt = round(full["tokens"]["prefill"] / setting.questions)
    context = prompt + setting.length - setting.suffix
    alone = setting.questions * setting.group * (prompt + setting.length)
    shares = full["tokens"]["update"] < alone  # next to no prompt may not be worth a shared row

    def update(context: int, suffix: int, share: bool) -> float:
        return setting.questions * work.update(context, suffix, setting.group, share)

    def decoding(context: int, suffix: int) -> float:
        return work.decoding(context, suffix, setting.questions * setting.group)

    rate = update(prompt, setting.length, shares) / full["phases"]["update"]
    bandwidth = decoding(prompt, setting.length) / full["phases"]["decode"]
    same = {"prefill": setting.questions * work.prefill(context) / rate}
    same["decode"] = decoding(context, setting.suffix) / bandwidth
    same["rest"] = full["seconds"] - sum(full["phases"][phase] for phase in ("prefill", "decode", "update"))
    checked: dict[str, Any] = {}
    for arm, share in (("rpo", True), ("rpo_plain_rows", False)):
        predicted = {**same, "update": update(context, setting.suffix, share) / rate}
        allowed, measured = (full["seconds"] / s for s in (sum(predicted.values()), record[arm]["seconds"]))
        checked[arm] = {
            "predicted": predicted, "measured": {phase: record[arm]["phases"].get(phase) for phase in predicted},
            "ratio_allowed": allowed, "ratio_measured": measured, "share_of_allowed": measured / allowed,
        }  # fmt: skip
    return checked


def check_table(checked: dict[str, Any]) -> str:
    """A Markdown table of seconds, predicted and measured."""
    lines = ["| arm | prefill | decode | update | full path over it | of what is allowed |", "|" + " --- |" * 6]
    for arm, of_arm in checked.items():
        seconds = [
            f"{of_arm['predicted'][p]:.1f} ({of_arm['measured'][p]:.1f})" for p in ("prefill", "decode", "update")
        ]
        ratio = f"{of_arm['ratio_allowed']:.2f} ({of_arm['ratio_measured']:.2f})"
        lines.append(f"| {arm} | {' | '.join(seconds)} | {ratio} | {of_arm['share_of_allowed']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Print predictions and the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iteration", type=Path, default=ROOT / "benchmarks" / "results" / "iteration.json")
    parser.add_argument("--quick", action="store_true", help="the same: nothing is run")
    arguments = parser.parse_args()
    models = {paper.size: Model.of(paper.size) for paper in PUBLISHED}
    assumed = f"products at {PRODUCT_EFFICIENCY:.0%}, attention at {ATTENTION_EFFICIENCY:.0%} and prefill at "
    assumed += f"{PREFILL_EFFICIENCY:.0%} of the peak, memory at {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth"
    record: dict[str, Any] = {"hardware": hardware(), "gpus": [asdict(gpu) for gpu in (H20, H100)]}
    print(f"predicted, not measured; assumed: {assumed}")
    for name, title, rows in (
        ("predictions", f"the paper's settings, {CONCURRENT} sequences at once", paper_settings(models)),
        ("update_shares", "seconds of a pass of 4 groups (150 + 2,543 + 6 × 146 tokens), H100", update_shares(models)),
        ("iterations", "seconds of an iteration of 576 such samples, one H100", iterations(models)),
        ("expected", "seconds that changes are expected to save in it", expected_gains(models)),
        ("one_gpu", "one GPU, products and prefill at half the peak, memory at its speed", one_gpu_settings(models)),
    ):
        record[name] = rows
        print(f"\n{title}\n\n{table(rows)}")
    print()
    if arguments.iteration.exists():
        record["check"] = check(json.loads(arguments.iteration.read_text()))
        print(f"against {arguments.iteration.name}, from its full path alone\n\n{check_table(record['check'])}\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
