"""The command ``rpo-lightning plan``."""

from __future__ import annotations

from rpo_lightning.cli.commands import COMMANDS
from rpo_lightning.cli.tool_cli import ToolCLI


def plan(arguments: list[str]) -> None:
    """Sample, estimate, print the estimates, and advise.

    Args:
        arguments: Command-line arguments after the command's name.
    """
    from rpo_lightning.cli.plan.module import PlanModule
    from rpo_lightning.cli.plan.report import PlanReport
    from rpo_lightning.cli.plan.settings import PlanSettings

    cli = ToolCLI("plan", COMMANDS["plan"], PlanModule, PlanSettings, arguments)
    module, data, settings = cli.model, cli.datamodule, cli.added
    module.settings, module.cache_settings = settings, cli.cache_settings
    # As many responses at once as in an iteration, for seconds that are like an iteration's.
    questions = round(data.batch_size * module.group_size / module.samples)
    data.eval_batch_size = max(1, min(questions, settings.questions))
    cli.predict_on("train")
    if cli.trainer.is_global_zero:
        report = PlanReport(module, data.batch_size)
        print("\n".join(report.lines()))
        if settings.out is not None:
            report.write(settings.out)
            print(f"wrote {settings.out}")
