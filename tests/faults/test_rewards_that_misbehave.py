"""Whatever a reward or a verifier does in its process costs that one answer, and the others get what they deserve.

The functions here behave for every response but ``bad``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from rpo_lightning.core.errors import ConfigurationError, RewardError
from rpo_lightning.core.types import Sample
from rpo_lightning.rewards import ExactMatchVerifier, FunctionReward, FunctionVerifier, Grader, GradingPool, Reward
from tests.conftest import make_data, make_module, make_trainer

SLEEP = ["sleep", f"600.{os.getpid()}"]  # no other process sleeps as long
NOTES = Path("not-set")  # where workers write; set before they are forked


def on_bad(response, act):
    return act() if response == "bad" else 1.0


# -- what has no result ---------------------------------------------------------------------------


def hangs(prompt, response, answer):
    return on_bad(response, lambda: time.sleep(600))


def hangs_in_c(prompt, response, answer):
    return on_bad(response, lambda: re.match(r"(a|a)*b", "a" * 50))


def hangs_and_does_not_listen(prompt, response, answer):
    def act():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                time.sleep(600)
            except BaseException:
                continue

    return on_bad(response, act)


def stops_itself(prompt, response, answer):
    return on_bad(response, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def forks_and_waits(prompt, response, answer):
    def act():
        os.fork()
        time.sleep(600)

    return on_bad(response, act)


def exits(prompt, response, answer):
    return on_bad(response, lambda: os._exit(0))


def aborts(prompt, response, answer):
    return on_bad(response, os.abort)


def crashes(prompt, response, answer):
    return on_bad(response, lambda: ctypes.string_at(0))


def closes_all_files(prompt, response, answer):
    return on_bad(response, lambda: os.closerange(3, 1024))


def writes_into_all_sockets(prompt, response, answer):
    def act():
        for name in os.listdir("/proc/self/fd"):
            if Path(f"/proc/self/fd/{name}").is_socket():
                os.write(int(name), b"\xff" * 64)

    return on_bad(response, act)


def takes_memory_at_once(prompt, response, answer):
    return on_bad(response, lambda: bytearray(2**40))


def takes_memory_bit_by_bit(prompt, response, answer):
    def act():
        kept = []
        while True:
            kept.append(str(len(kept)) * 100_000)

    return on_bad(response, act)


def takes_memory_for_a_tensor(prompt, response, answer):
    return on_bad(response, lambda: torch.ones(2**34))


def takes_memory_and_tells_otherwise(prompt, response, answer):
    def act():
        try:
            bytearray(2**40)
        except MemoryError:
            raise ValueError("cannot grade this")  # noqa: B904

    return on_bad(response, act)


LOST = {
    hangs: r"was killed after 0\.5 s",
    hangs_in_c: r"was killed after 0\.5 s",
    hangs_and_does_not_listen: r"was killed after 0\.5 s",
    stops_itself: r"was killed after 0\.5 s",
    forks_and_waits: r"was killed after 0\.5 s",
    exits: r"ended with its process \(exit code 0\)",
    aborts: r"ended with its process \(signal SIGABRT\)",
    crashes: r"ended with its process \(signal SIGSEGV\)",
    closes_all_files: r"ended with its process \(exit code 1\)",
    writes_into_all_sockets: r"ended with its process \(it sent what is no reply\)",
    takes_memory_at_once: r"took more than 0\.25 GiB",
    takes_memory_bit_by_bit: r"took more than 0\.25 GiB",
    takes_memory_for_a_tensor: r"took more than 0\.25 GiB",
    takes_memory_and_tells_otherwise: r"took more than 0\.25 GiB",
}


def graded(function, responses, as_verifier=False, **settings):
    """The values of responses, and the pool that they were graded in."""
    path = f"{__name__}.{function.__name__}"
    pool = GradingPool(**{"workers": 2, "timeout_seconds": 0.5, "memory_gib": 0.25, **settings})
    verifier = FunctionVerifier(path) if as_verifier else ExactMatchVerifier()
    reward = FunctionReward(path)
    try:
        (group,) = Grader(verifier, [reward], pool).grade([[Sample("q", r, "1", 3, True) for r in responses]])
    finally:
        pool.close()
    return ([s.correct for s in group.samples] if as_verifier else group.rewards), pool


@pytest.mark.parametrize("function", LOST)
def test_an_answer_without_a_result_scores_zero_and_is_counted_and_the_others_keep_theirs(function, caplog, processes):
    seconds = 0.5 if "0\\.5 s" in LOST[function] else 60.0
    values, pool = graded(function, ["good", "bad", "good", "good", "bad", "good"], timeout_seconds=seconds)
    assert values == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert pool.killed == 2
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1  # once for each kind
    assert re.match(rf"{function.__name__} {LOST[function]}: such responses count as wrong", told[0])
    assert processes.now() == set()


def test_a_verdict_that_is_lost_is_wrong_and_its_reward_is_lost_apart():
    values, pool = graded(exits, ["good", "bad"], as_verifier=True, timeout_seconds=60.0)
    assert values == [1.0, 0.0]
    assert pool.killed == 2  # its verdict and its reward


def test_a_long_message_to_a_worker_that_does_not_read_is_given_up(processes):
    """A socket takes some 200 kB; the rest waits for the worker, which was stopped from outside before."""
    pool = GradingPool(workers=1, timeout_seconds=0.5)
    assert pool.numbers(good, [("q", "x", "a")]) == [1.0]
    (worker,) = processes.now()
    worker.suspend()
    assert pool.numbers(good, [("q", "x" * 3_000_000, "a"), ("q", "x", "a")]) == [0.0, 1.0]
    pool.close()


def good(prompt, response, answer):
    return 1.0


# -- what is odd and has a result -----------------------------------------------------------------


def prints_a_lot(prompt, response, answer):
    for _ in range(200):
        print("noise \ud800" * 1000)
        sys.stderr.write("noise" * 1000)
        os.write(1, b"noise" * 1000)
        os.write(2, b"noise" * 1000)
    subprocess.run(["echo", "noise"], check=True)
    return 1.0


def reads_standard_input(prompt, response, answer):
    return float(sys.stdin.read() == "" and os.read(0, 10) == b"" and subprocess.run(["cat"]).returncode == 0)


def forks_and_both_come_back(prompt, response, answer):
    os.fork()
    return 1.0


def forks_and_the_child_raises(prompt, response, answer):
    if os.fork() == 0:
        raise SystemExit(3)
    return 1.0


def leaves_processes_behind(prompt, response, answer):
    subprocess.Popen(SLEEP)
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    return 1.0


def limits_a_process_of_its_own(prompt, response, answer):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join()
    with subprocess.Popen(SLEEP) as other:
        other.terminate()
    return float(process.exitcode == -signal.SIGTERM and other.returncode == -signal.SIGTERM)


def takes_less_memory(prompt, response, answer):
    return float(len(bytearray(100 * 2**20)) > 0)


ODD = [
    prints_a_lot, reads_standard_input, forks_and_both_come_back, forks_and_the_child_raises, leaves_processes_behind,
    limits_a_process_of_its_own, takes_less_memory,
]  # fmt: skip


@pytest.mark.parametrize("function", ODD)
def test_an_odd_function_gets_its_value_leaves_no_process_and_nothing_on_the_terminal(function, capfd, processes):
    values, pool = graded(function, ["x"] * 6, timeout_seconds=30.0)
    assert values == [1.0] * 6
    assert pool.killed == 0
    assert capfd.readouterr() == ("", "")
    assert processes.now() == set()
    sleeping = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == SLEEP]
    assert sleeping == []


# -- what ends the run ----------------------------------------------------------------------------


class OddError(Exception):
    """Cannot be pickled and read again, as exceptions with arguments of their own."""

    def __init__(self, first, second):
        super().__init__(f"{first}\nand {second}")


class MuteError(Exception):
    def __str__(self):
        raise ValueError


def raises(prompt, response, answer):
    raise OddError("one", "two")


def raises_without_words(prompt, response, answer):
    raise MuteError


def returns_nan(prompt, response, answer):
    return float("nan")


def returns_infinity(prompt, response, answer):
    return torch.tensor(float("inf"))


def returns_words(prompt, response, answer):
    return "very good"


def returns_two(prompt, response, answer):
    return torch.ones(2)


def returns_more_than_a_float(prompt, response, answer):
    return 10**400


def returns_a_function(prompt, response, answer):
    return lambda: 1.0


def returns_very_much(prompt, response, answer):
    return "x" * 2**25


def recurses(prompt, response, answer):
    return recurses(prompt, response, answer)


TOLD = {
    raises: r"raises raised OddError: one and two \(test_rewards_that_misbehave\.py:\d+\)",
    raises_without_words: r"raises_without_words raised MuteError: an exception without a text",
    returns_nan: "reward 'returns_nan' returned nan for the response 'one': return a finite number",
    returns_infinity: "reward 'returns_infinity' returned inf for the response 'one': return a finite number",
    returns_words: "reward 'returns_words' returned str, which is no number",
    returns_two: "reward 'returns_two' returned Tensor, which is no number",
    returns_more_than_a_float: "reward 'returns_more_than_a_float' returned int, which is no number",
    returns_a_function: "returns_a_function raised AttributeError: Can't pickle|returns_a_function raised Pickling",
    returns_very_much: "returns_very_much returned 32 MiB: a verdict or a reward is a number",
    recurses: "recurses raised RecursionError",
}


@pytest.mark.parametrize("function", TOLD)
def test_a_function_that_is_wrong_ends_the_run_with_a_line_that_names_it(function, processes):
    with pytest.raises(RewardError, match=TOLD[function]) as told:
        graded(function, ["one", "two"], timeout_seconds=30.0)
    assert "\n" not in str(told.value)
    assert processes.now() == set()


class InThisProcess(Reward):
    """A term of the trainer's own process that does what it is told."""

    def __init__(self, act):
        super().__init__(weight=10.0)
        self.act = act

    def score(self, group):
        return self.act(group)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda group: {}["key"], r"reward 'in_this_process' raised KeyError: 'key' \(test_rewards_that_misbehave"),
        (lambda group: None, "reward 'in_this_process' returned 1 values for 2 responses"),
        (lambda group: [1.0], "returned 1 values for 2 responses"),
        (lambda group: [10**400] * 2, "reward 'in_this_process' returned int, which is no number: int too large"),
        (lambda group: [1e308] * 2, r"the weighted sum of model\.rewards returned inf for the response 'one'"),
    ],
)
def test_a_term_of_the_trainers_process_that_is_wrong_is_named_too(act, message):
    grader = Grader(ExactMatchVerifier(), [InThisProcess(act)], GradingPool())
    with pytest.raises(RewardError, match=message):
        grader.grade([[Sample("q", r, "1", 3, True) for r in ("one", "two")]])


# -- the pool -------------------------------------------------------------------------------------


def waits_for_the_others(prompt, response, answer):
    """``bad`` ends when all others have been graded."""
    if response != "bad":
        with NOTES.open("a") as file:
            file.write(f"{response}\n")
    while response == "bad" and (not NOTES.exists() or len(NOTES.read_text().split()) < 5):
        time.sleep(0.01)
    return 1.0


def test_one_slow_answer_does_not_hold_up_the_others_even_where_one_process_grades(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NOTES", tmp_path / "graded")
    values, pool = graded(
        waits_for_the_others, ["bad", "a", "b", "c", "d", "e"], workers=None, timeout_seconds=60.0
    )  # a pool that nobody has told of cores takes one
    assert values == [1.0] * 6
    assert pool.killed == 0


def sleeps_where_told(prompt, response, answer):
    if response == "bad":
        NOTES.write_text(str(os.getpid()))
        time.sleep(600)
    return 1.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_killed_from_outside_costs_its_answer_and_an_idle_one_costs_none(
    tmp_path, monkeypatch, processes, number
):
    monkeypatch.setattr(f"{__name__}.NOTES", tmp_path / "pid")
    pool = GradingPool(workers=2, timeout_seconds=60.0)

    def kill_when_it_works():
        while not (NOTES.exists() and NOTES.read_text()):
            time.sleep(0.01)
        os.kill(int(NOTES.read_text()), number)

    outside = threading.Thread(target=kill_when_it_works)
    outside.start()
    assert pool.numbers(sleeps_where_told, [("q", r, "1") for r in ("a", "bad", "b", "c")]) == [1.0, 0.0, 1.0, 1.0]
    outside.join()
    assert pool.killed == 1
    idle = processes.now()
    assert idle
    for worker in idle:
        worker.send_signal(number)
        while worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    assert pool.numbers(sleeps_where_told, [("q", "a", "1")] * 4) == [1.0] * 4
    assert pool.killed == 1
    pool.close()


def own_process(prompt, response, answer):
    return float(os.getpid())


def test_workers_are_replaced_on_the_way_and_ten_thousand_answers_leave_nothing_behind(processes):
    pool = GradingPool(workers=2)
    pids = set()
    for _ in range(10):
        pool.start()  # as every rollout does
        pids |= set(pool.numbers(own_process, [("q", "x", "1")] * 1000))
        workers = processes.now()
        assert len(workers) == 2
        assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert len(pids) > 4
    pool.close()
    assert processes.now() == set()


TRAINER = """
import os, signal, sys, time
from rpo_lightning.rewards import GradingPool
pool = GradingPool(workers=2)
signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer that saves a checkpoint first
def own(*_):
    return float(os.getpid())
before = set(pool.numbers(own, [()] * 100))
print(*(int(pid) for pid in before), flush=True)
sys.stdin.readline()
after = set(pool.numbers(own, [()] * 100))
print(pool.killed, after <= before, flush=True)
time.sleep(600)
"""


def test_a_signal_to_the_trainers_group_reaches_no_worker_and_workers_end_with_a_trainer_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        os.killpg(trainer.pid, signal.SIGTERM)
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline().split() == ["0", "True"]  # none was lost, and the same workers answer
        trainer.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert alive == []


def too_much_for_some(prompt, response, answer):
    return float(len(bytearray(2**40 if sum(map(ord, response)) % 2 else 1)))


def test_a_run_counts_answers_that_take_too_much_memory_and_goes_on(tmp_path):
    module = make_module(
        rewards=[FunctionReward(f"{__name__}.too_much_for_some")],
        grading=GradingPool(workers=1, memory_gib=0.5),
        max_response_tokens=64,
    )
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
    samples = [s for group in module.groups for s in group.samples]
    over = [sum(map(ord, s.response)) % 2 == 1 for s in samples]
    assert 0 < sum(over) == module.record.killed < len(over)
    rewards = [r for group in module.groups for r in group.rewards]
    assert rewards == [0.0 if lost else 1.0 for lost in over]


@pytest.mark.parametrize("settings", [{"memory_gib": 0}, {"memory_gib": float("nan")}, {"timeout_seconds": 0}])
def test_a_limit_that_is_none_is_refused(settings):
    with pytest.raises(ConfigurationError, match=r"model\.grading needs .* limits above 0"):
        GradingPool(**settings)
