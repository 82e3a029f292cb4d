"""Other planners' rules, each at the point where its published constants tip it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.planner_baselines import (
    Hpa,
    LlmDSloAware,
    LlmDTokenAware,
    Pool,
    Static,
    counts_of,
    towards,
)
from benchmarks.planner_dynamo import DynamoLoad, DynamoThroughput, Kalman, Sla
from engine.simulated import profile_choice
from planner.observation import Observation, Traffic, WorkerSeen
from planner.scaling import Counts, Drain, ScalingPolicy, Start
from slipstream.performance import Predictor, read_profile
from slipstream.v1.registry_pb2 import Role, WorkerState

POOL = Pool("m", 8)
PREDICTOR = Predictor(read_profile(profile_choice.PACKAGED / "qwen3-32b-h200-tp1.json"))
SLA = Sla(ttft_s=2.0, itl_s=0.05)


def worker(role: Role.ValueType, number: int, **seen: Any) -> WorkerSeen:
    state = seen.pop("state", WorkerState.READY)
    return WorkerSeen(f"{role}-{number}", "m", role, state, 0.0, **seen)


def observation(
    at_s: float, prefill: Sequence[dict[str, Any]], decode: Sequence[dict[str, Any]], traffic: Traffic | None = None
) -> Observation:
    workers = [worker(Role.ROLE_PREFILL, n, **one) for n, one in enumerate(prefill)]
    workers += [worker(Role.ROLE_DECODE, n, **one) for n, one in enumerate(decode)]
    return Observation(at_s, at_s, 5.0, tuple(workers), {("m", "realtime"): traffic or Traffic()})


def wanted(policy: ScalingPolicy, seen: Observation) -> Counts:
    return policy.decide(seen).targets["m"]


def busy(arrivals: int = 50, ttft_s: float = 0.5, itl_s: float = 0.02) -> Traffic:
    traffic = Traffic(arrivals=arrivals, input_tokens=arrivals * 2000, finished=arrivals, output_tokens=arrivals * 200)
    traffic.ttft.add(ttft_s, arrivals)
    traffic.itl.add(itl_s, arrivals)
    return traffic


def test_a_static_split_is_restored_when_a_worker_is_gone() -> None:
    decision = Static(POOL, Counts(2, 2)).decide(observation(5.0, [{}], [{}, {}]))
    assert decision.actions == (Start("m", Role.ROLE_PREFILL),)


def test_a_worker_that_drains_counts_no_more() -> None:
    seen = observation(5.0, [{}, {"state": WorkerState.DRAINING}], [{}])
    assert counts_of(seen, "m") == Counts(1, 1)


def test_the_budget_cuts_growth_and_never_what_is_there() -> None:
    seen = observation(5.0, [{}] * 3, [{}] * 4)
    decision = towards(seen, POOL, Counts(6, 5), "more")
    assert decision.targets["m"] == Counts(4, 4)
    assert len(decision.actions) == 1


def test_the_least_loaded_worker_is_drained() -> None:
    seen = observation(5.0, [{"running": 3}, {"running": 1}], [{}])
    assert towards(seen, POOL, Counts(1, 1), "less").actions == (Drain("1-1"),)


def test_the_autoscaler_leaves_what_is_within_its_tolerance() -> None:
    assert wanted(Hpa(POOL), observation(15.0, [{"prefill_busy": 0.76}] * 2, [{}])).prefill == 2


def test_the_autoscaler_grows_by_utilization_over_target() -> None:
    assert wanted(Hpa(POOL), observation(15.0, [{"prefill_busy": 1.0}] * 2, [{}])).prefill == 3


def test_the_autoscaler_shrinks_only_after_five_minutes() -> None:
    policy = Hpa(POOL)
    policy.decide(observation(15.0, [{"prefill_busy": 0.7}] * 3, [{}]))
    assert wanted(policy, observation(300.0, [{"prefill_busy": 0.1}] * 3, [{}])).prefill == 3
    assert wanted(policy, observation(330.0, [{"prefill_busy": 0.1}] * 3, [{}])).prefill == 1


def test_token_aware_adds_one_pod_when_the_queue_is_longer_than_a_second_and_a_half() -> None:
    policy = LlmDTokenAware(POOL, 10_000.0)
    assert wanted(policy, observation(5.0, [{"waiting_tokens": 14_000}], [{}])).prefill == 1
    assert wanted(policy, observation(10.0, [{"waiting_tokens": 90_000}], [{}])).prefill == 2


def test_token_aware_waits_three_minutes_before_the_next_pod() -> None:
    policy = LlmDTokenAware(POOL, 10_000.0)
    policy.decide(observation(5.0, [{"waiting_tokens": 90_000}], [{}]))
    assert wanted(policy, observation(100.0, [{"waiting_tokens": 90_000}] * 2, [{}])).prefill == 2
    assert wanted(policy, observation(190.0, [{"waiting_tokens": 90_000}] * 2, [{}])).prefill == 3


def test_token_aware_keeps_decode_at_four_fifths_of_the_cache() -> None:
    policy = LlmDTokenAware(POOL, 10_000.0)
    assert wanted(policy, observation(5.0, [{}], [{"blocks": 100, "blocks_used": 79}])).decode == 1
    assert wanted(policy, observation(10.0, [{}], [{"blocks": 100, "blocks_used": 85}])).decode == 2


@pytest.mark.parametrize(("ttft_s", "prefill"), [(0.7, 2), (1.0, 2), (1.5, 3)])
def test_slo_aware_grows_above_its_target(ttft_s: float, prefill: int) -> None:
    policy = LlmDSloAware(POOL, 2.0, 0.05)
    assert wanted(policy, observation(5.0, [{}] * 2, [{}], busy(ttft_s=ttft_s))).prefill == prefill


@pytest.mark.parametrize(("ttft_s", "prefill"), [(0.9, 4), (0.5, 3)])
def test_slo_aware_shrinks_only_below_its_lower_threshold(ttft_s: float, prefill: int) -> None:
    policy = LlmDSloAware(POOL, 2.0, 0.05)
    assert wanted(policy, observation(5.0, [{}] * 4, [{}], busy(ttft_s=ttft_s))).prefill == prefill


def test_dynamo_adds_a_worker_when_every_estimate_breaks_the_sla() -> None:
    policy = DynamoLoad(POOL, PREDICTOR, SLA)
    waiting = {"waiting_tokens": 60_000}
    assert wanted(policy, observation(5.0, [waiting, {}], [{}], busy())).prefill == 2
    assert wanted(policy, observation(10.0, [waiting, waiting], [{}], busy())).prefill == 3


def test_dynamo_removes_a_worker_only_when_the_survivors_would_hold() -> None:
    policy = DynamoLoad(POOL, PREDICTOR, SLA)
    full = {"running": 100, "context_tokens": 260_000, "blocks": 20_000}
    assert wanted(policy, observation(5.0, [{}], [full, full], busy())).decode == 2
    assert wanted(policy, observation(10.0, [{}], [{"blocks": 20_000}] * 2, busy())).decode == 1


def test_dynamo_sees_what_waits_for_room_at_decode() -> None:
    policy = DynamoLoad(POOL, PREDICTOR, SLA)
    waiting = {"running": 60, "context_tokens": 150_000, "waiting": 150, "waiting_tokens": 900_000, "blocks": 20_000}
    assert wanted(policy, observation(5.0, [{}], [waiting], busy())).decode == 2


def test_dynamo_only_looks_on_while_a_worker_starts() -> None:
    policy = DynamoLoad(POOL, PREDICTOR, SLA)
    starting = {"state": WorkerState.STARTING}
    seen = observation(5.0, [{"waiting_tokens": 60_000}, starting], [{}], busy())
    assert wanted(policy, seen).prefill == 2


def test_dynamos_forecast_rule_divides_demand_by_what_a_worker_does() -> None:
    policy = DynamoThroughput(POOL, PREDICTOR, SLA)
    policy.decide(observation(5.0, [{}], [{}], busy(1000)))
    counts = wanted(policy, observation(180.0, [{}], [{}], busy(1000)))
    assert counts.prefill == 2  # 11.1 prompts of 2,000 tokens a second, each worker computes about 8
    assert counts.decode >= 1


def test_dynamos_forecast_rule_waits_for_its_interval() -> None:
    policy = DynamoThroughput(POOL, PREDICTOR, SLA)
    assert wanted(policy, observation(5.0, [{}], [{}], busy(5000))) == Counts(1, 1)


def test_the_filter_follows_a_trend() -> None:
    kalman = Kalman()
    forecasts = [kalman.next_after(10.0 * n) for n in range(1, 30)]
    assert forecasts[-1] == pytest.approx(300.0, rel=0.05)
