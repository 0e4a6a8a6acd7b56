"""``rpo-lightning report``: a run as one HTML page with curves, times, the cache and some completions.

``rpo-lightning report runs/quickstart/version_0`` reads the files of the run's callbacks and of its CSV logger in that
folder, and writes ``report.html`` there. The page holds its pictures and its style.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from rpo_lightning.cli.parser import PlainArgumentParser
from rpo_lightning.core.errors import DataError, one_line, require_modules
from rpo_lightning.core.files import replacing
from rpo_lightning.core.run_files import COMPLETIONS_FILE, METRICS_FILE, REPORT_FILE, SUMMARY_FILE


@dataclass(frozen=True)
class Panel:
    """One picture: columns of the metrics over iterations. An iteration makes one update, several or none.

    Attributes:
        title: The picture's title.
        unit: Unit of the vertical axis.
        columns: Columns of the metrics file, each with its label.
        stacked: Whether the columns add up to a whole.
    """

    title: str
    unit: str
    columns: Sequence[tuple[str, str]]
    stacked: bool = False


PANELS = (
    Panel(
        "Reward in training, and held-out accuracy without a prefix",
        "mean",
        [
            ("reward/mean", "reward in training"),
            ("reward/correct_share", "right in training (with a prefix)"),
            ("val/accuracy", "held out, no prefix"),
        ],
    ),
    Panel(
        "Lengths",
        "tokens per sample",
        [
            ("rollout/response_tokens", "whole response"),
            ("rollout/decoded_tokens_per_sample", "decoded"),
            ("rollout/kept_prefix_tokens", "prefix"),
            ("val/response_tokens", "held out"),
        ],
    ),
    Panel(
        "Groups without variance",
        "share of groups",
        [
            ("rollout/zero_variance_share", "all"),
            ("rollout/all_right_share", "all right"),
            ("rollout/all_wrong_share", "all wrong"),
            ("rollout/truncated_share", "responses cut off"),
        ],
    ),
    Panel("Cache", "share", [("cache/correct_share", "right"), ("cache/initial_token_share", "tokens of the start")]),
    Panel("Age of the cached responses", "updates", [("cache/age", "mean age")]),
    Panel("Update", "nats", [("loss/entropy", "entropy"), ("loss/kl", "KL to the reference")]),
)


def write_report(run: str) -> None:
    """Write ``report.html`` into a run's folder.

    Args:
        run: Folder of the run. It holds ``metrics.csv``; the page also shows its other files, if any.

    Raises:
        ConfigurationError: A package of the extra ``analysis`` is not installed.
        DataError: The folder holds no ``metrics.csv``, or a file that cannot be read.
    """
    require_modules("analysis", "jinja2", "matplotlib", "pandas")
    from jinja2 import Environment, PackageLoader, select_autoescape

    folder = Path(run)
    metrics_path, summary_path = folder / METRICS_FILE, folder / SUMMARY_FILE
    if not metrics_path.is_file():
        raise DataError(f"{folder}: holds no {METRICS_FILE}; name the folder of a run with a CSVLogger")
    metrics = read_metrics(metrics_path)
    summary = _json_objects(summary_path, [summary_path.read_text()])[0] if summary_path.is_file() else None
    times = Panel(
        "Seconds of an iteration, by phase",
        "seconds",
        [(c, c.removeprefix("time/")) for c in metrics.columns if c.startswith("time/")],
        stacked=True,
    )
    pictures = [(panel.title, draw(metrics, panel)) for panel in (*PANELS, times) if has_data(metrics, panel)]
    environment = Environment(
        loader=PackageLoader("rpo_lightning.cli", "report"), autoescape=select_autoescape(default=True)
    )
    page = environment.get_template("report.html.j2").render(
        name=str(folder), summary=summary, pictures=pictures, completions=read_completions(folder)
    )
    with replacing(folder / REPORT_FILE) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"report written to {folder / REPORT_FILE}")


def read_metrics(path: Path) -> Any:
    """Read the metrics of a run as a pandas table.

    Raises:
        DataError: It is no table of numbers, or has no rows.
    """
    import pandas as pd

    try:
        metrics = pd.read_csv(path)
    except ValueError as error:  # pandas' own errors are such
        raise DataError(f"{path}: not a table that can be read ({one_line(error)}): name another run") from error
    if "step" not in metrics or not len(metrics):
        raise DataError(f"{path}: has no rows with a step: name the folder of a run that has trained")
    words = [str(name) for name in metrics.columns if not pd.api.types.is_numeric_dtype(metrics[name])]
    if words:
        raise DataError(f"{path}: its column {words[0]!r} holds something other than numbers: mend it")
    return metrics


def _json_objects(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    try:
        found = [json.loads(text) for text in texts]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read ({one_line(error)}): move the file away") from error
    if not all(isinstance(value, dict) for value in found):
        raise DataError(f"{path}: holds something other than JSON objects: move the file away")
    return found


def has_data(metrics: Any, panel: Panel) -> bool:
    """Whether the run logged any column of a panel."""
    return any(c in metrics and metrics[c].notna().any() for c, _ in panel.columns)


def draw(metrics: Any, panel: Panel) -> str:
    """Draw a panel; returns a PNG in base64."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.4))
    series = {label: metrics[["step", c]].dropna() for c, label in panel.columns if c in metrics}
    series = {label: rows for label, rows in series.items() if len(rows)}
    if panel.stacked:
        table = pd.concat([rows.set_index("step").iloc[:, 0].rename(label) for label, rows in series.items()], axis=1)
        table = table.groupby(level=0).sum()
        axis.stackplot(table.index, table.fillna(0.0).T.to_numpy(), labels=list(table.columns))
    else:
        for label, rows in series.items():
            axis.plot(rows["step"], rows.iloc[:, 1], marker="." if len(rows) < 60 else None, label=label)
    axis.set_xlabel("iterations")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def read_completions(folder: Path, limit: int = 6) -> list[dict[str, Any]]:
    """Read the last completions that the run logged."""
    path = folder / COMPLETIONS_FILE
    if not path.is_file():
        return []
    rows = _json_objects(path, path.read_text(encoding="utf-8").splitlines()[-limit:])
    if not all(isinstance(row.get("reward"), int | float) for row in rows):
        raise DataError(f"{path}: a row has no reward: move the file away")
    return rows


def report(arguments: list[str]) -> None:
    """Write the page of a run into its folder."""
    auto_cli(write_report, args=arguments, prog="rpo-lightning report", parser_class=PlainArgumentParser)
