"""What changes of the package are expected to bring in one iteration on one GPU; on paper, not measured.

The iteration is the paper's at L = 300: 96 questions, G = 6, 150 + 2,543 tokens of context, suffixes of 146 tokens,
gradient checkpointing, micro-batches of 16,384 tokens, vLLM. Each change is taken alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from common.predicted import BANDWIDTH_EFFICIENCY, PREFILL_EFFICIENCY, Gpu, Model, Rows

QUESTIONS, GROUP, CONTEXT, SUFFIX, MICRO_BATCH = 96, 6, 150 + 2543, 146, 16_384
# Assumed, not measured.
PCIE_EFFICIENCY = 0.7
STALL_SECONDS = 50e-6  # the queue runs empty at a synchronisation, and the next kernels are launched one by one
AT_ONCE = 256  # sequences that vLLM decodes together
# Assumed: seconds that two workers grade 576 samples on 2 cores. host_overhead_before.json has 0.2 and 3.2.
GRADING_SECONDS = (1.3, 3.0)
# Counted on a pretend GPU: synchronisations of a micro-batch before, and of an update after, with the gradient's norm.
SYNCHRONISATIONS = (25, 5)


@dataclass(frozen=True)
class Change:
    """Seconds of the affected part before and after a change, each as lowest and highest; ``applies`` says where."""

    name: str
    before: tuple[float, float]
    after: tuple[float, float]
    applies: str
    assumption: str

    def saved(self) -> tuple[float, float]:
        """Lowest and highest seconds saved."""
        low, high = (b - a for b, a in zip(self.before, self.after, strict=True))
        return low, high


def same(seconds: float) -> tuple[float, float]:
    """An estimate without a range."""
    return seconds, seconds


def iteration(gpu: Gpu, model: Model) -> dict[str, float]:
    """Seconds of the phases of the iteration."""
    rows = Rows(CONTEXT, SUFFIX, GROUP, 1)
    sequences = QUESTIONS * GROUP
    prefill = QUESTIONS * model.work.prefill(CONTEXT) / (gpu.flops * PREFILL_EFFICIENCY)
    decode = sequences / AT_ONCE * gpu.moving(model.work.decoding(CONTEXT, SUFFIX, AT_ONCE))
    update = model.update(gpu, rows, QUESTIONS, micro_batches(rows))
    return {"prefill": prefill, "decode": decode, "update": update.total, "elementwise": update.elementwise}


def micro_batches(rows: Rows) -> int:
    """Passes of an update."""
    return ceil(QUESTIONS / (MICRO_BATCH // rows.tokens))


def changes(gpu: Gpu, model: Model) -> Iterator[Change]:
    """All changes, for a model on a GPU."""
    yield _sleep(gpu, model)
    yield _autocast_cache(gpu, model)
    yield _fused_kernels(gpu, model)
    least, most = (max(0.0, seconds - iteration(gpu, model)["decode"]) for seconds in GRADING_SECONDS)
    yield Change(
        "grading while others decode", GRADING_SECONDS, (least, most),
        "every engine", "grading as on 2 CPU cores; all of it can overlap with decoding, the last samples' too",
    )  # fmt: skip
    yield _synchronisations(gpu, model)
    yield _contexts(gpu, model)


def _sleep(gpu: Gpu, model: Model) -> Change:
    copies = 2 * 2 * model.weights / (gpu.pcie * PCIE_EFFICIENCY)
    return Change(
        "sleep level 2, not 1", same(copies), same(0.0), "vLLM",
        f"bf16 weights go to the CPU and back over PCIe 5 at {PCIE_EFFICIENCY:.0%} of 64 GB/s; the sync is made anyway",
    )  # fmt: skip


def _autocast_cache(gpu: Gpu, model: Model) -> Change:
    at_once = 16 * GROUP
    cached = 2 * model.work.cache * (16 * CONTEXT + at_once * SUFFIX / 2)  # a context's keys and values are read once
    steps = SUFFIX * QUESTIONS * GROUP / at_once
    before, after = (steps * gpu.moving(a_weight * model.weights + cached) for a_weight in (4 + 2 + 2, 2))
    return Change(
        "weights cast once a rollout", same(before), same(after), "TransformersEngine under bf16-mixed",
        f"{at_once} sequences at once; bound by memory, which a real loop of small kernels is not",
    )  # fmt: skip


def _fused_kernels(gpu: Gpu, model: Model) -> Change:
    rows = Rows(CONTEXT, SUFFIX, GROUP, 1)
    before, after = (model.update(gpu, rows, QUESTIONS, micro_batches(rows), fused).total for fused in (False, True))
    return Change(
        "fused elementwise kernels", same(before), same(after), "update, models that Liger knows",
        f"plain and fused kernels both reach {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth",
    )  # fmt: skip


def _synchronisations(gpu: Gpu, model: Model) -> Change:
    rows = Rows(CONTEXT, SUFFIX, GROUP, 1)
    passes = micro_batches(rows)
    stalls = [count * STALL_SECONDS for count in (SYNCHRONISATIONS[0] * passes, SYNCHRONISATIONS[1])]
    # Gathers of a forward pass: queries and outputs of suffixes, keys and values of contexts; each read and written.
    query, key = model.work.pair / (4 * model.layers), model.work.cache / (2 * model.layers)
    numbers = 2 * query * GROUP * SUFFIX + 2 * key * CONTEXT
    copied = 2 * 2 * numbers * model.layers * QUESTIONS * 4  # two passes forward, and one backward of twice as many
    gathers = gpu.moving(copied)
    return Change(
        "fewer synchronisations, slices for gathers", (stalls[0], stalls[0] + gathers), same(stalls[1]),
        "update on a GPU", f"a stall takes {STALL_SECONDS * 1e6:.0f} µs; the higher figure counts gathers too",
    )  # fmt: skip


def _contexts(gpu: Gpu, model: Model) -> Change:
    limit, group = 4096, 16
    contexts = ceil(group * SUFFIX / (limit - CONTEXT))
    before, after = (
        model.update(gpu, Rows(CONTEXT, SUFFIX, group, count), QUESTIONS, QUESTIONS * contexts).total
        for count in (contexts, 1)
    )
    return Change(
        "a context once, over micro-batches", same(before), same(after),
        f"groups above micro_batch_tokens; here G = {group} and {limit} tokens ({contexts} rows a group). "
        f"0 for G = {GROUP} and {MICRO_BATCH}", "keys and values wait for their gradient without another cost",
    )  # fmt: skip
