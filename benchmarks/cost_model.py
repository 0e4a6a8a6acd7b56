"""What an iteration should take, from floating-point operations and bytes; on paper, not measured.

``python benchmarks/cost_model.py`` predicts iterations with the paper's settings (DeepSeek-R1-Distill-Qwen
1.5B and 7B, G = 6, 576 samples, the lengths of its Table 2) on H20 and H100 GPUs and sets the ratio of full
path to RPO beside its Table 3. Then it checks itself against ``iteration.json``: from the rates that the full path
reached there, RPO's iterations are predicted, with shared rows and with a row per response.

The model: a matrix product costs two operations a weight and token, three times that to train, four times
with gradient checkpointing; decoding reads the weights and the key–value cache once a step; prompts and
prefixes are prefilled once a group. Efficiencies are assumed, and said so in the output. The paper's
baseline has one of eight GPUs sample while seven train, one after the other; its hours contain more than
these phases. The last line is JSON; its ``hardware`` is the machine that the script ran on, of which the predictions
know nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.machine import hardware
from common.random_policy import make
from common.work import ModelWork

ROOT = Path(__file__).parents[1]
GROUP, SAMPLES, PROMPT = 6, 576, 150
# Shares of the peak that are assumed, not measured.
TRAIN_EFFICIENCY, PREFILL_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.4, 0.5, 0.6
CONCURRENT = 256


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, memory bandwidth in bytes/s (vendor's figures)."""

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Model:
    """Weights in matrix products, and bytes of keys and values a token, in bf16."""

    name: str
    weights: float
    cache_bytes: float
    full_length: float
    suffixes: tuple[tuple[int, float], ...]  # (L, generated tokens) of Table 2
    published_ratio: float  # Table 3, L = 800


GPUS = (Gpu("H20", 148e12, 4.0e12), Gpu("H100", 989e12, 3.35e12))
H200 = Gpu("H200", 989e12, 4.8e12)
MODELS = (
    Model("1.5B", 1.54e9, 2 * 28 * 2 * 128 * 2, 2689.5, ((300, 145.9), (500, 158.4), (800, 382.2)), 9.2),
    Model("7B", 7.07e9, 2 * 28 * 4 * 128 * 2, 2457.9, ((300, 147.1), (500, 168.2), (800, 397.9)), 3.6),
)


@dataclass(frozen=True)
class Iteration:
    """Predicted seconds of one update's iteration."""

    prefill: float
    decode: float
    update: float

    @property
    def total(self) -> float:
        """All phases, one after the other."""
        return self.prefill + self.decode + self.update


def predict(
    gpu: Gpu, model: Model, prefix: float, suffix: float, shared: bool, samplers: int, trainers: int
) -> Iteration:
    """An iteration of ``SAMPLES`` responses of ``prefix`` kept and ``suffix`` sampled tokens."""
    groups = SAMPLES / GROUP
    context = PROMPT + prefix
    prefill = 2 * model.weights * groups * context / (gpu.flops * PREFILL_EFFICIENCY * samplers)
    concurrent = min(CONCURRENT, SAMPLES / samplers)
    step_bytes = 2 * model.weights + concurrent * (context + suffix / 2) * model.cache_bytes
    step = max(
        step_bytes / (gpu.bandwidth * BANDWIDTH_EFFICIENCY),
        2 * model.weights * concurrent / (gpu.flops * PREFILL_EFFICIENCY),
    )
    decode = step * SAMPLES * suffix / (concurrent * samplers)
    tokens = groups * (context + GROUP * suffix) if shared else SAMPLES * (context + suffix)
    update = 8 * model.weights * tokens / (gpu.flops * TRAIN_EFFICIENCY * trainers)
    return Iteration(prefill, decode, update)


def paper_settings() -> list[dict[str, object]]:
    """Full path over RPO for every model, GPU, L and arrangement of eight GPUs."""
    rows: list[dict[str, object]] = []
    for model in MODELS:
        for gpu in GPUS:
            for arrangement, samplers, trainers in (("1 samples, 7 train", 1, 7), ("8 do both", 8, 8)):
                full = predict(gpu, model, 0, model.full_length, False, samplers, trainers)
                shared_full = predict(gpu, model, 0, model.full_length, True, samplers, trainers)
                for limit, suffix in model.suffixes:
                    prefix = model.full_length - suffix
                    plain, shared = (
                        predict(gpu, model, prefix, suffix, share, samplers, trainers) for share in (False, True)
                    )
                    rows.append({
                        "model": model.name, "gpu": gpu.name, "gpus": arrangement, "L": limit,
                        "full_seconds": full.total, "rpo_plain_seconds": plain.total, "rpo_seconds": shared.total,
                        "ratio_plain": full.total / plain.total, "ratio_shared": shared_full.total / shared.total,
                        "published_ratio": model.published_ratio if limit == 800 else None,
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


def one_gpu_settings() -> list[dict[str, object]]:
    """What one GPU allows with the paper's lengths at L = 300: 150 + 2543 + 146 tokens, 16 questions at a time."""
    rows: list[dict[str, object]] = []
    for size in ("qwen2-1.5b", "qwen2-7b"):
        work = ModelWork.of(make(size, "meta"))
        for gpu in (GPUS[1], H200):
            for group in (6, 16):
                ratios = on_one_gpu(gpu, work, Setting(PROMPT, 2689, 146, group, 16))
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


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(h.replace("_", " ") for h in head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{v:.1f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    rows = paper_settings()
    assumed = f"training at {TRAIN_EFFICIENCY:.0%} and prefill at {PREFILL_EFFICIENCY:.0%} of the peak, decoding at "
    assumed += f"{BANDWIDTH_EFFICIENCY:.0%} of the bandwidth, {CONCURRENT} sequences at once"
    print(f"predicted, not measured; assumed: {assumed}\n\n{table(rows)}\n")
    one_gpu = one_gpu_settings()
    print(f"one GPU, training and prefill at half the peak, decoding at the memory's speed\n\n{table(one_gpu)}\n")
    record: dict[str, Any] = {
        "hardware": hardware(), "gpus": [asdict(g) for g in GPUS], "predictions": rows, "one_gpu": one_gpu,
    }  # fmt: skip
    if arguments.iteration.exists():
        record["check"] = check(json.loads(arguments.iteration.read_text()))
        print(f"against {arguments.iteration.name}, from its full path alone\n\n{check_table(record['check'])}\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
