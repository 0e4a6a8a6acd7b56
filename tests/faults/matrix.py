"""One cell of the kill matrix: a run is killed at a point, resumed, and compared with the whole one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.faults.compare import difference
from tests.faults.kill import Fault
from tests.faults.runs import Runs, arguments

# What a process ends with after a signal: if it is killed, or if it ends in order.
CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGUSR1": 138, "press_ctrl_c": 130, "press_ctrl_c 2": -2}


def kill_and_resume(
    runs: Runs,
    folder: Path,
    policy: Path,
    whole: Path,
    faults: Sequence[Fault],
    settings: Sequence[str] = (),
    ranks: int = 1,
) -> str | None:
    """Kill a run and those that resume it, resume it once more, and compare.

    Args:
        runs: What starts runs.
        folder: Where this one goes.
        policy: The micro policy.
        whole: The folder of the uninterrupted run.
        faults: What kills the run, and each run that resumes it.
        settings: Further arguments of both runs.
        ranks: Processes of the runs.

    Returns:
        What is wrong; ``None`` if the run ended bit-identical.
    """
    command = arguments(folder, policy, settings)
    for number, fault in enumerate(faults):
        resume = ["--ckpt_path=last"] if number else []
        code = runs.run(folder, [*command, *resume], fault, ranks=ranks)[fault.rank]
        if code != CODES[fault.does]:
            return f"the run ended with {code}, not with {CODES[fault.does]}: {tail(folder)}"
        if runs.left:
            return f"the run left processes behind: {runs.left}"
    codes = runs.run(folder, [*command, "--ckpt_path=last"], ranks=ranks)
    if any(codes):
        return f"the resumed run ended with {codes}: {tail(folder)}"
    if runs.left:
        return f"the resumed run left processes behind: {runs.left}"
    return difference(whole, folder, ranks)


def tail(folder: Path) -> str:
    """The last lines that a run has printed."""
    return (folder / "output.txt").read_text()[-1500:]
