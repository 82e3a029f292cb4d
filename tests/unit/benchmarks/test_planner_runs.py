"""How workloads, searches and targets of the planner's benchmark are made."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.planner import ORACLE, targets
from benchmarks.planner_loads import WORKLOADS, rising
from benchmarks.planner_runs import OURS, RULES, Measured, best_of, border, run, split_named
from planner.scaling import Counts
from simulator import loads
from simulator.traces import Arrival


def measured(rule: str, attainment: float, per_hour: float, counts: str = "1P1D", gpu_hours: float = 1.0) -> Measured:
    return Measured("day", rule, counts, attainment, 1, 1, per_hour, 1, gpu_hours, 1, 1, 1, 0, 0, 0)


def test_the_oracle_is_the_cheapest_that_keeps_the_limits() -> None:
    found = [measured("a", 0.98, 900), measured("b", 0.99, 500), measured("c", 1.0, 400)]
    assert best_of(found, 0.99).rule == "b"


def test_where_none_keeps_the_limits_the_oracle_is_the_one_with_most_within_them() -> None:
    assert best_of([measured("a", 0.6, 900), measured("b", 0.9, 500)], 0.99).rule == "b"


def test_the_search_walks_along_the_border_and_finds_the_least_split() -> None:
    tried = border(
        8, 0.99, lambda counts: measured("x", float(counts >= Counts(3, 0) and counts.decode >= 2), 1, str(counts))
    )
    good = [split_named(one.counts) for one in tried if one.attainment == 1.0]
    assert Counts(3, 2) in good
    assert len(tried) <= 14


def test_a_trace_that_rises_keeps_its_order_and_gets_faster() -> None:
    even = [Arrival(float(second), str(second), 1, 1) for second in range(301)]
    times = [one.at_s for one in rising(even, (1.0, 2.0, 4.0))]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] == 1.0
    assert gaps[150] == pytest.approx(0.5)
    assert gaps[-1] == pytest.approx(0.25)
    assert times == sorted(times)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_serves_a_short_load(rule: str) -> None:
    load = loads.Synthetic(loads.Constant(2.0), loads.Fixed(2000), loads.Fixed(50), requests=60)
    workload = replace(WORKLOADS["day"], load=lambda: load)
    found = run(workload, rule)
    assert found.attainment > 0.9
    assert 0.0 < found.gpu_hours < 1.0


def test_targets_compare_with_the_oracle_and_with_the_best_of_the_others() -> None:
    results = [measured(OURS, 0.992, 960), measured(ORACLE, 0.995, 1000), measured("hpa", 0.99, 800)]
    found = {one.name: one.met for one in targets(results)}
    assert found["day: goodput per GPU-hour against the oracle"]
    assert found["day: SLO attainment"]
    assert not found["day: goodput per GPU-hour against the best rule"]
