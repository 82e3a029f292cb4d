"""The comparison of routing policies: the same trace for all, and targets that can be missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.router import targets
from benchmarks.router_policies import POLICIES, Setting, replay
from simulator.journey import Distribution, Summary

SETTING = Setting("qwen3-32b-h200-tp4", 4, 4, speed=6.0, requests=400)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_the_whole_trace(policy: str) -> None:
    summary = replay(replace(SETTING, requests=120), policy)
    assert (summary.requests, summary.failed) == (120, 0)
    assert 0 < summary.ttft.p50 <= summary.e2e.p50


def test_routing_by_what_is_cached_finds_more_of_it() -> None:
    assert replay(SETTING, "kv").hit_rate > 1.5 * replay(SETTING, "round_robin").hit_rate


def test_a_replay_can_be_repeated() -> None:
    assert replay(replace(SETTING, frontends=2), "kv") == replay(replace(SETTING, frontends=2), "kv")


def a_summary(seconds: float) -> Summary:
    of = Distribution(seconds, seconds, seconds, seconds)
    return Summary(10, 0, of, of, of, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def test_targets_are_met_by_what_is_better_and_missed_by_what_is_not() -> None:
    others = {name: a_summary(10.0) for name in POLICIES if name != "kv"}
    assert all(target.met for target in targets(others | {"kv": a_summary(4.9)}))
    assert not any(target.met for target in targets(others | {"kv": a_summary(10.2)}))
