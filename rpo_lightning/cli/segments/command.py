"""``rpo-lightning segments``: accuracy and similarity along reasoning paths, as tables and pictures."""

from __future__ import annotations

from rpo_lightning.cli.tool_cli import ToolCLI


def segments(arguments: list[str]) -> None:
    """Take reasoning paths apart: accuracy after cuts, similarity of beginnings."""
    from rpo_lightning.cli.segments.analysis import SegmentAnalysis
    from rpo_lightning.cli.segments.results import SegmentResultsCallback

    cli = ToolCLI("segments", SegmentAnalysis, SegmentResultsCallback, arguments)
    cli.predict_on("predict", "val", "train")
