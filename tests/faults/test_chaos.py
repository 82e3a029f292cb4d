"""A short chaos run: `python -m tests.faults.chaos` is the long one."""

from __future__ import annotations

import pytest

from tests.faults.chaos import plan
from tests.faults.chaos.run import Options, run_in_process

SEED = 36


def test_a_plan_is_a_function_of_its_seed() -> None:
    shape = plan.Shape()
    assert plan.draw(3, 10.0, shape) == plan.draw(3, 10.0, shape)
    assert plan.draw(3, 10.0, shape) != plan.draw(4, 10.0, shape)


def test_of_each_kind_of_process_one_is_never_ended() -> None:
    for seed in range(20):
        drawn = plan.draw(seed, 20.0, plan.Shape())
        ended = {
            (fault.group, fault.index)
            for one in drawn.rounds
            for fault in one.faults
            if fault.kind in (plan.Kind.KILL, plan.Kind.DRAIN, plan.Kind.KILL_ENGINE)
        }
        assert not ended & set(drawn.spared.items())


@pytest.mark.timeout(300)
def test_under_faults_no_token_is_wrong_and_nothing_is_lost_or_leaks() -> None:
    report = run_in_process(Options(seed=SEED, minutes=0.3), timeout_s=280.0)
    assert report["violations"] == []
    assert report["requests"]["answered"] > 30
    assert sum(report["faults"].values()) >= 2
    assert report["quiet_points"] == report["rounds"] >= 2
