"""Whole runs of a micro policy from the command line, in processes that may be killed.

``python -m tests.faults.runs`` imports what a run imports once, and then forks a process for each run that it reads a
line for: starting Python costs ten times what such a run does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from rpo_lightning.rollout.vllm.platform import import_vllm
from tests.faults.kill import Fault, set_up

ROOT = Path(__file__).parents[2]
TWO_RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"]
_VLLM_OPTIONS = {"max_num_seqs": 8, "block_size": 32, "kv_cache_memory_bytes": 2**25}
# A busy machine must not end a grading: what is compared depends on no clock.
VLLM = [
    "--model.engine=VLLMEngine",
    f"--model.engine.options={json.dumps(_VLLM_OPTIONS)}",
    "--model.grading.timeout_seconds=600",
]
# So long the processes that a run has started may take to notice that it has ended.
SECONDS_TO_LEAVE = 20.0


def arguments(folder: Path, policy: Path, settings: Sequence[str] = ()) -> list[str]:
    """The command line: 8 updates of 2 questions, a cache that is filled before, validations and exports."""
    checkpoints = {"every_n_train_steps": 2, "save_last": True, "save_on_exception": True}
    callbacks = [
        {"class_path": "tests.faults.final_state.FinalState", "init_args": {"folder": str(folder)}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
    ]
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder / "runs"), "name": "x"},
    }
    rewards = [{"class_path": "FunctionReward", "init_args": {"function": "tests.faults.runs.share_of_digits"}}]
    return [
        "fit", f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.logger={json.dumps(logger)}",
        "--trainer.max_steps=8", "--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null",
        "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false", f"--model.policy={policy}", "--model.verifier=MathVerifier",
        f"--model.rewards={json.dumps(rewards)}", "--model.group_size=3",
        "--model.max_response_tokens=10", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.003",
        "--model.update.minibatches_per_pass=2", "--model.lr_schedule.name=cosine", "--model.grading.workers=1",
        "--data.train=ArithmeticChain", "--data.train.size=7", "--data.train.seed=1", "--data.train.operations=2",
        "--data.val=ArithmeticChain", "--data.val.size=3", "--data.val.seed=2", "--data.val.operations=2",
        "--data.batch_size=2", "--data.eval_batch_size=2",
        "--cache.cut=UniformCut", "--cache.cut.max_cut=6", "--cache.initialisation=eager",
        "--cache.initial_batch_size=2", "--cache.keep_unfinished=true", "--export.every_n_steps=4",
        "--completions.every_n_batches=1", *settings,
    ]  # fmt: skip


def share_of_digits(prompt: str, response: str, answer: str) -> float:
    """A reward that differs between the answers of a policy that knows nothing."""
    return sum(character.isdigit() for character in response) / 10


class Runs:
    """Starts runs, one after the other.

    Attributes:
        seconds_apart: Seconds from the end of the last run's first rank to that of its last rank.
        left: The command lines of processes that the last run has left behind.
    """

    def __init__(self) -> None:
        self.seconds_apart = 0.0
        self.left: list[str] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment.pop("PL_GLOBAL_SEED", None)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runs"],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self,
        folder: Path,
        command: list[str],
        *faults: Fault,
        environment: dict[str, str] | None = None,
        ranks: int = 1,
    ) -> list[int]:
        """Run a command to its end.

        Args:
            folder: Where its output goes, to ``output.txt``.
            command: The arguments of the command line.
            faults: What happens to it.
            environment: Further variables.
            ranks: How many processes run it, each started by itself, as srun does.

        Returns:
            The exit code of each rank; minus the signal's number if a signal killed it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        line = {
            "command": command,
            "faults": faults,
            "output": str(folder / "output.txt"),
            "environment": environment or {},
            "ranks": ranks,
        }
        self._server.stdin.write(json.dumps(line) + "\n")
        self._server.stdin.flush()
        ended = json.loads(self._server.stdout.readline())
        self.seconds_apart = max(ended["seconds"]) - min(ended["seconds"])
        self.left = ended["left"]
        return list(ended["codes"])

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a run leaves behind becomes a child of this process
    for name in (
        "math_verify", "pyarrow.parquet", "transformers.models.llama.modeling_llama", "transformers.optimization",
        "rpo_lightning.cli.lightning_cli", "tests.faults.final_state",
    ):  # fmt: skip
        import_module(name)
    for line in sys.stdin:
        what = json.loads(line)
        if VLLM[0] in what["command"]:
            import_vllm()
        port = _free_port()
        children: list[int] = []
        for rank in range(what["ranks"]):
            children.append(os.fork())
            if not children[-1]:
                _run(what, rank, port)
        ended: dict[int, tuple[int, float]] = {}
        while not ended.keys() >= set(children):
            child, status = os.wait()
            ended[child] = (os.waitstatus_to_exitcode(status), time.monotonic())
        codes, seconds = zip(*(ended[child] for child in children), strict=True)
        print(json.dumps({"codes": codes, "seconds": seconds, "left": _left()}), flush=True)


def _left() -> list[str]:
    """The command lines of processes that ended runs have left behind, after they had time to end. They are killed."""
    until = time.monotonic() + SECONDS_TO_LEAVE
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        found = psutil.Process().children(recursive=True)
        if not found or time.monotonic() > until:
            break
        time.sleep(0.02)
    lines = []
    for process in found:
        with suppress(psutil.Error):
            lines.append(" ".join([str(process.pid), process.status(), *process.cmdline()]))
            process.kill()
    return lines


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _run(what: dict[str, Any], rank: int, port: int) -> None:
    """Run a command in this forked process, and end it."""
    from rpo_lightning.callbacks import cache_filling
    from rpo_lightning.cli.main import main

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script started the tests with "&"
    if what["ranks"] > 1:
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(what["ranks"]),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
    path = what["output"] if rank == 0 else what["output"].replace(".txt", f"-{rank}.txt")
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(what["environment"])
    code: Any = 0
    try:
        cache_filling.SECONDS_BETWEEN_SAVES, cache_filling.SHARE_OF_SAVING = 0.0, 1e9  # after every batch
        for fault in what["faults"]:
            set_up(Fault(*fault))
        main(what["command"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
