"""A run that is killed at any moment resumes, and ends bit-identical to one that was not.

Compared are weights, optimizer, schedule, cache, every iteration's questions, prefixes, rollouts, rewards
and generators, and the logged metrics. No process is left behind by a run that was killed.
"""

from __future__ import annotations

import pytest

from tests.faults.kill import Fault
from tests.faults.matrix import kill_and_resume
from tests.faults.points import FEW, POINTS, TWICE, VLLM_POINTS, VLLM_TWICE
from tests.faults.runs import VLLM

ALL = [(phase, name) for phase, points in POINTS.items() for name in points]
ALL_WITH_VLLM = [(phase, name) for phase, points in VLLM_POINTS.items() for name in points]


def name_of(faults: list[Fault]) -> str:
    return ", then ".join(f"{f.when} call {f.call} of {f.target.partition(':')[2]}" for f in faults)


@pytest.mark.parametrize(("phase", "name"), FEW)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(runs, micro_policy, whole, tmp_path, phase, name):
    assert kill_and_resume(runs, tmp_path, micro_policy, whole, [POINTS[phase][name]]) is None


@pytest.mark.soak
@pytest.mark.parametrize(("phase", "name"), ALL)
def test_every_point_of_the_matrix(runs, micro_policy, whole, tmp_path, outcomes, phase, name):
    fault = POINTS[phase][name]
    wrong = kill_and_resume(runs, tmp_path, micro_policy, whole, [fault])
    outcomes.add(wrong, ranks=1, engine="transformers", phase=phase, point=name, call=name_of([fault]))
    assert wrong is None


@pytest.mark.soak
@pytest.mark.parametrize("name", TWICE)
def test_a_run_that_is_killed_again_and_again(runs, micro_policy, whole, tmp_path, outcomes, name):
    wrong = kill_and_resume(runs, tmp_path, micro_policy, whole, TWICE[name])
    outcomes.add(wrong, ranks=1, engine="transformers", phase="several", point=name, call=name_of(TWICE[name]))
    assert wrong is None


@pytest.mark.soak
@pytest.mark.parametrize(("phase", "name"), ALL_WITH_VLLM)
def test_every_point_with_rollouts_on_vllm(
    runs, micro_policy_for_vllm, whole_with_vllm, tmp_path, outcomes, phase, name
):
    fault = VLLM_POINTS[phase][name]
    wrong = kill_and_resume(runs, tmp_path, micro_policy_for_vllm, whole_with_vllm, [fault], VLLM)
    outcomes.add(wrong, ranks=1, engine="vllm", phase=phase, point=name, call=name_of([fault]))
    assert wrong is None


@pytest.mark.soak
@pytest.mark.parametrize("name", VLLM_TWICE)
def test_a_run_with_rollouts_on_vllm_that_is_killed_again_and_again(
    runs, micro_policy_for_vllm, whole_with_vllm, tmp_path, outcomes, name
):
    faults = VLLM_TWICE[name]
    wrong = kill_and_resume(runs, tmp_path, micro_policy_for_vllm, whole_with_vllm, faults, VLLM)
    outcomes.add(wrong, ranks=1, engine="vllm", phase="several", point=name, call=name_of(faults))
    assert wrong is None
