"""The measurement of the simulator's speed: it counts all requests, and a smaller run promises nothing."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.simulator_speed import PROMISE, Point, Setting, measured, targets

SETTING = Setting(400, "qwen3-32b-h200-tp1", 2, 3, 2.0)


def test_a_run_serves_all_requests_and_tells_each_quarter() -> None:
    run = measured(SETTING)
    assert (run.figures.requests, run.figures.finished) == (400, 400)
    assert [(one.share, one.requests) for one in run.points] == [(0.25, 100), (0.5, 200), (0.75, 300), (1.0, 400)]
    assert not any(one.met for one in targets(SETTING, run)), "a small run meets a large promise"


def test_targets_are_met_by_what_keeps_them_and_missed_by_what_does_not() -> None:
    whole = replace(SETTING, requests=1_000_000, prefill=32, decode=32)
    run = measured(SETTING)
    points = [Point(share, 1, 1.0, 100.0) for share in (0.25, 0.5, 0.75, 1.0)]
    good = replace(run, cpu_s=599.0, points=points)
    assert [(one.met, one.target) for one in targets(whole, good)] == [(True, PROMISE)] * 2
    slow = replace(run, cpu_s=601.0, points=[*points[:3], Point(1.0, 1, 1.0, 111.0)])
    assert not any(one.met for one in targets(whole, slow))
