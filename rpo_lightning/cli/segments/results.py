"""The results of a segment analysis: a Parquet file and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rpo_lightning.cli.segments.analysis import accuracy_of, grouped_by_first_answer
from rpo_lightning.cli.segments.similarity import TextSimilarity, TfidfSimilarity
from rpo_lightning.core.errors import require_modules
from rpo_lightning.core.files import require_place, write_parquet
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.evaluation import Estimate

RESULTS_FILE = "segments.parquet"
PICTURE_FILE = "segments.png"
# Bins of the axis of tokens cut.
CUT_BINS = 8


class SegmentResultsCallback(BasePredictionWriter):
    """Writes ``segments.parquet`` and ``segments.png``.

    Args:
        out: Folder for the files.
        similarity: How to measure the similarity of prefixes; TF-IDF of character n-grams if not given.
        title: Title of the picture.
    """

    def __init__(
        self, out: str = "segments", similarity: TextSimilarity | None = None, title: str = "Segment analysis"
    ) -> None:
        require_place(out, "--out", is_folder=True)
        super().__init__(write_interval="epoch")
        self.out = Path(out)
        self.similarity = similarity or TfidfSimilarity()
        self.title = title

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the needed modules and models are there, before sampling starts."""
        require_modules("analysis", "matplotlib")
        self.similarity.prepare()

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the files; a collective, rank 0 writes."""
        rows = gather_rows([row for batch in predictions for row in batch], ("uid", "kept"))
        if not trainer.is_global_zero:
            return
        write_parquet(rows, self.out / RESULTS_FILE)
        alike = similarities([r for r in rows if r["answers"]], self.similarity)
        draw(rows, alike, self.title, self.out / PICTURE_FILE)
        print(f"{len({r['uid'] for r in rows})} questions, {len(rows)} cuts: {self.out / RESULTS_FILE}")
        print(f"picture: {self.out / PICTURE_FILE}")


def similarities(rows: Sequence[dict[str, Any]], measure: TextSimilarity) -> list[list[float]]:
    """The mean similarity of prefixes of equal length, for each question and length.

    Args:
        rows: The records with ``answers``, one for each question.
        measure: How to measure similarity.

    Returns:
        For each question, one value for each length.
    """
    measure.fit([prefixes[-1] for row in rows for prefixes in row["answers"]])
    return [
        [measure.mean_of_pairs([prefixes[i] for prefixes in row["answers"]]) for i in range(len(row["answers"][0]))]
        for row in rows
    ]


def draw(rows: Sequence[dict[str, Any]], alike: Sequence[Sequence[float]], title: str, path: Path) -> None:
    """Draw three panels: accuracy by share of the first answer, accuracy by tokens cut, and similarity of prefixes.

    Args:
        rows: All records.
        alike: Similarities, see ``similarities``.
        title: Title of the picture.
        path: Where to save it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8))
    longest = max(r["first_tokens"] for r in rows)
    width = longest / CUT_BINS
    for name, of_group in grouped_by_first_answer(rows).items():
        if not of_group:
            continue
        questions = len({r["uid"] for r in of_group})
        label = f"{name} ({questions} question{'s' if questions > 1 else ''})"
        by_share = _binned(of_group, lambda r: r["share"])
        by_cut = _binned(of_group, lambda r: min(int(r["cut"] // width), CUT_BINS - 1) * width + width / 2)
        for axis, binned in ((axes[0], by_share), (axes[1], by_cut)):
            _line(axis, binned, label)
    axes[0].set_xlabel("share of the first answer kept")
    axes[1].set_xlabel(f"tokens cut from the end of the first answer (bins of {width:.0f})")
    for axis in axes[:2]:
        axis.set_ylabel("accuracy of the continuations")
        axis.set_ylim(-0.02, 1.02)
    steps = max((len(a) for a in alike), default=0)
    complete = [a for a in alike if len(a) == steps]
    if complete:
        shares = {(i + 1) / steps: [a[i] for a in complete] for i in range(steps)}
        _line(axes[2], shares, f"{len(complete)} questions")
    axes[2].set_xlabel("length of the prefix, share of the shortest answer")
    axes[2].set_ylabel("cosine similarity of answers' prefixes")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    figure.suptitle(f"{title}; bands: 95 % bootstrap intervals over questions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _binned(rows: Sequence[dict[str, Any]], bin_of: Any) -> dict[float, list[float]]:
    bins: dict[float, list[float]] = {}
    for row in rows:
        bins.setdefault(bin_of(row), []).append(accuracy_of(row))
    return dict(sorted(bins.items()))


def _line(axis: Any, bins: dict[float, list[float]], label: str) -> None:
    positions = list(bins)
    estimates = [Estimate.of_values(torch.tensor(values)) for values in bins.values()]
    (line,) = axis.plot(positions, [e.value for e in estimates], marker="o", label=label)
    band = ([e.low for e in estimates], [e.high for e in estimates])
    axis.fill_between(positions, *band, color=line.get_color(), alpha=0.15)
