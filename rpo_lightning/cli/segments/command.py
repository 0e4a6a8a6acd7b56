"""The command ``rpo-lightning segments``."""

from __future__ import annotations

from rpo_lightning.cli.commands import COMMANDS
from rpo_lightning.cli.tool_cli import ToolCLI


def segments(arguments: list[str]) -> None:
    """Run a segment analysis and write its table and picture.

    Args:
        arguments: Command-line arguments after the command's name.
    """
    from rpo_lightning.cli.segments.analysis import SegmentAnalysis
    from rpo_lightning.cli.segments.results import SegmentResultsCallback

    cli = ToolCLI("segments", COMMANDS["segments"], SegmentAnalysis, SegmentResultsCallback, arguments)
    cli.predict_on("predict", "val", "train")
