"""Runs of ``rpo-lightning fit`` in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def fitted(
    config: str, overrides: Sequence[str], save_dir: Path, threads: int | None = None, quiet: bool = True
) -> dict[str, Any]:
    """The summary of a run. A run that has ended is not made again, and one that was stopped goes on.

    Args:
        config: The config's path, from the project's folder.
        overrides: Further arguments of ``fit``.
        save_dir: The folder of this run alone.
        threads: Threads of its process; all cores if not given.
        quiet: Whether to keep what it prints to itself.

    Raises:
        SystemExit: It failed. The message has the end of what it printed.
    """
    if not list(save_dir.glob("*/*/summary.json")):
        command = [
            sys.executable, "-m", "rpo_lightning", "fit", f"--config={config}",
            f"--trainer.logger.init_args.save_dir={save_dir.resolve()}", *overrides,
        ]  # fmt: skip
        if list(save_dir.glob("*/*/checkpoints/*.ckpt")):
            command.append("--ckpt_path=last")
        path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=quiet, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{save_dir}: failed\n{(done.stderr or '')[-2000:]}")
    summaries = sorted(save_dir.glob("*/*/summary.json"))
    return dict(json.loads(summaries[-1].read_text()))
