"""A simulated cluster: every request comes to its end, in the same way each time, and takes the time it must."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.router.ask import Ask
from frontend.router.fleet import Fleet
from frontend.router.route import Route
from simulator.journey import Journey, summarize
from simulator.serving import MODEL, SimulatedCluster, fixed_cluster
from simulator.traces import Arrival
from slipstream.performance import DecodePoint, Predictor, PrefillPoint, Profile
from slipstream.v1.registry_pb2 import Role

PROFILE = Profile(
    name="p",
    model="m",
    device="d",
    source="a test",
    measured_on="2026-01-01",
    prefill=(PrefillPoint(100, 0.02), PrefillPoint(1000, 0.11)),
    decode=tuple(DecodePoint(b, c, 0.01 + b * 0.001 + c * 1e-6) for b in (1, 16) for c in (128, 4096)),
    block_tokens=16,
    block_bytes=16000,
    blocks=200,
    step_tokens=512,
    max_running=16,
    max_model_len=2048,
    transfer_bytes_per_s=1e8,
    transfer_latency_s=0.001,
)
PREDICT = Predictor(PROFILE)


@dataclass
class InTurn:
    """Round robin; `alone` sends everything to decode alone."""

    alone: bool = False
    turn: count[int] = field(default_factory=count)

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route:
        turn = next(self.turn)
        prefill, decode = (fleet.pool(MODEL, role) for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE))
        assert decode is not None
        first = decode.members[turn % len(decode)].record
        if self.alone or prefill is None:
            return Route(first, None, "decode_alone")
        return Route(first, prefill.members[turn % len(prefill)].record, "round_robin")


def served_by(
    arrivals: list[Arrival], *, alone: bool = False, prefill: int = 2, decode: int = 2
) -> tuple[SimulatedCluster, list[Journey]]:
    cluster, kept = fixed_cluster((PROFILE, PROFILE), (prefill, decode), [InTurn(alone)])
    cluster.run(arrivals)
    return cluster, kept.journeys


def served(arrivals: list[Arrival], *, prefill: int = 2) -> list[Journey]:
    return served_by(arrivals, prefill=prefill)[1]


def times(journey: Journey) -> tuple[float, ...]:
    return journey.begun_s, journey.computed_s, journey.first_token_s, journey.ended_s


loads = st.lists(
    st.builds(
        lambda gap_s, tokens, output, prefix: (gap_s, tokens, output, prefix),
        st.floats(0, 0.2),
        st.integers(1, 1500),
        st.integers(1, 60),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=30,
)


def arrivals_of(load: list[tuple[float, int, int, int]]) -> list[Arrival]:
    arrivals, now_s = [], 0.0
    for number, (gap_s, tokens, output, prefix) in enumerate(load):
        now_s += gap_s
        keys = tuple(prefix * 1000 + block + 1 for block in range(tokens // 16))
        arrivals.append(Arrival(now_s, str(number), tokens, output, keys))
    return arrivals


@settings(max_examples=40, deadline=None)
@given(loads, st.booleans())
def test_every_request_ends_and_its_stages_come_in_order(load: list[tuple[float, int, int, int]], alone: bool) -> None:
    arrivals = arrivals_of(load)
    cluster, journeys = served_by(arrivals, alone=alone)
    assert [one.arrival for one in journeys] == arrivals
    for one in journeys:
        assert one.error == ""
        assert one.arrival.at_s <= one.begun_s <= one.computed_s <= one.first_token_s <= one.ended_s
        assert 0 <= one.cached_tokens < one.arrival.input_tokens
    for worker in cluster.workers.values():
        assert worker.scheduler.pool.used == 0, f"{worker.worker_id} holds blocks of requests that are over"
        assert worker.scheduler.load().waiting_tokens == 0
    for frontend in cluster.frontends:
        members = [one for pool in frontend.fleet.pools.values() for one in pool.members]
        assert [one.requests for one in members] == [0] * len(members)


@settings(max_examples=10, deadline=None)
@given(loads)
def test_the_same_load_goes_the_same_way_each_time(load: list[tuple[float, int, int, int]]) -> None:
    first, second = (served(arrivals_of(load)) for _ in range(2))
    assert [times(one) for one in first] == [times(one) for one in second]


def test_a_lone_prompt_takes_its_prefill_its_last_blocks_way_and_a_step() -> None:
    (one,) = served([Arrival(1.0, "a", 400, 5)])
    assert one.computed_s - 1.0 == pytest.approx(PREDICT.prefill_s(400))
    travel_s = 400 / 16 * 16000 / 1e8
    # All in one step: nothing of its way is hidden.
    assert one.first_token_s - one.computed_s == pytest.approx(travel_s + 0.001 + PREDICT.prefill_s(1, 399), abs=2e-3)
    assert one.tpot_s == pytest.approx(PREDICT.decode_s(1, 403), rel=0.05)


def test_a_long_prompts_transfer_is_mostly_hidden_behind_its_computation() -> None:
    (one,) = served([Arrival(0.0, "a", 1500, 2)])
    travel_s = 1500 / 16 * 16000 / 1e8
    assert one.first_token_s - one.computed_s < 0.6 * travel_s + PREDICT.prefill_s(1, 1499) + 0.002


def test_what_is_cached_is_not_computed_again() -> None:
    keys = tuple(range(1, 51))
    first, second = served([Arrival(0.0, "a", 800, 2, keys), Arrival(5.0, "b", 800, 2, keys)], prefill=1)
    assert (first.cached_tokens, second.cached_tokens) == (0, 784)
    assert second.ttft_s < first.ttft_s


def test_a_summary_counts_who_met_the_limits() -> None:
    journeys = served([Arrival(at_s / 10, str(at_s), 600, 10) for at_s in range(20)])
    easy = summarize(journeys, ttft_slo_s=1e9, tpot_slo_s=1e9)
    assert (easy.attainment, easy.failed, easy.requests) == (1.0, 0, 20)
    assert summarize(journeys, ttft_slo_s=0.0, tpot_slo_s=0.0).attainment == 0.0
    assert easy.ttft.p50 <= easy.ttft.p90 <= easy.ttft.p99
    assert easy.imbalance == pytest.approx(1.0)
    assert summarize([], ttft_slo_s=1, tpot_slo_s=1).requests == 0
