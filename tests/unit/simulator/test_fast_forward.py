"""Fast-forwarding: many ticks in one event come to the same as an event for each, whatever happens meanwhile."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.scaling import Action, Counts, Drain, Flip, Start
from simulator.outcome import Outcome
from simulator.run import Failure, ModelSetup, Setup, simulate
from simulator.traces import Arrival
from slipstream.performance import DecodePoint, Predictor
from slipstream.v1.registry_pb2 import Role
from tests.unit.simulator.test_run import LIMITS, Scripted
from tests.unit.simulator.test_serving import PROFILE

# Contexts that answers grow through, and a slope that changes there; few blocks, so that some are preempted.
BENT = msgspec.structs.replace(
    PROFILE,
    blocks=100,
    max_model_len=1024,
    decode=tuple(
        DecodePoint(batch, context, 0.005 + batch * 0.0007 + step_s)
        for batch in (1, 4, 16)
        for context, step_s in ((64, 0.001), (128, 0.0011), (300, 0.004), (2048, 0.005))
    ),
)

requests = st.lists(
    st.tuples(
        st.floats(0.0, 0.3),
        st.integers(1, 500),
        st.integers(1, 120),
        st.integers(0, 2),
        st.sampled_from(["realtime", "batch"]),
    ),
    min_size=1,
    max_size=30,
)
ACTIONS: tuple[Action, ...] = (
    Start("m", Role.ROLE_DECODE),
    Drain("decode-1"),
    Flip("decode-1", Role.ROLE_PREFILL),
    Flip("prefill-1", Role.ROLE_DECODE),
)
scripts = st.dictionaries(st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.sampled_from(ACTIONS), max_size=3)


def arrivals_of(load: list[tuple[float, int, int, int, str]]) -> list[Arrival]:
    arrivals, now_s = [], 0.0
    for number, (gap_s, tokens, answer, family, service_class) in enumerate(load):
        # No two things at the same time: which of them comes first is nobody's promise.
        now_s += gap_s + 1e-5 * (number + 1) ** 0.5
        keys = tuple(family * 1000 + block + 1 for block in range(tokens // PROFILE.block_tokens))
        arrivals.append(Arrival(now_s, str(number), tokens, answer, keys, service_class=service_class))
    return arrivals


@settings(max_examples=40, deadline=None)
@given(requests, scripts, st.none() | st.floats(0.1, 3.0), st.sampled_from([(2, 2), (0, 2), (1, 1)]))
def test_many_ticks_in_one_event_come_to_the_same_as_one_by_one(
    load: list[tuple[float, int, int, int, str]],
    script: dict[float, Action],
    fails_s: float | None,
    counts: tuple[int, int],
) -> None:
    outcomes, seen = [], []
    for step_by_step in (True, False):
        policy = Scripted({at_s: (action,) for at_s, action in script.items()})
        setup = Setup(
            (ModelSetup("m", BENT, Counts(*counts), LIMITS),),
            arrivals_of(load),
            policy,
            interval_s=0.5,
            start_s=0.7,
            flip_s=0.2,
            failures=() if fails_s is None else (Failure(fails_s),),
            series_s=1.0,
            keep_journeys=True,
            step_by_step=step_by_step,
        )
        outcomes.append(simulate(setup))
        seen.append(policy.seen)
    one_by_one, at_once = outcomes
    assert _told(at_once) == pytest.approx(_told(one_by_one), rel=1e-9, abs=1e-9)
    assert [one.busy_share for one in at_once.workers] == pytest.approx(
        [one.busy_share for one in one_by_one.workers], rel=1e-9
    )
    for before, after in zip(*seen, strict=True):
        for one, other in zip(before.workers, after.workers, strict=True):
            assert (one.worker_id, one.running, one.waiting, one.blocks_used, one.context_tokens) == (
                other.worker_id, other.running, other.waiting, other.blocks_used, other.context_tokens,
            )  # fmt: skip


def _told(outcome: Outcome) -> list[float]:
    """All times and counts of all requests; names as their lengths and sums, to be compared as numbers."""
    told = [outcome.duration_s, outcome.gpu_hours]
    for one in outcome.journeys:
        told += [one.begun_s, one.computed_s, one.first_token_s, one.ended_s]
        told += [one.cached_tokens, one.fetched_tokens, one.preemptions, one.attempts]
        told += [sum(map(ord, name)) for name in (one.prefill, one.decode, one.reason, one.error)]
    return told


@given(
    st.floats(1.0, 20.0).map(round),
    st.floats(1.0, 3000.0),
    st.integers(1, 400),
)
def test_a_run_of_steps_takes_as_long_as_its_steps(batch: int, context: float, most: int) -> None:
    predictor = Predictor(BENT)
    steps, first_s, each_s = predictor.decode_run(batch, context, most)
    assert 1 <= steps <= most
    told = [first_s + number * each_s for number in range(steps)]
    assert told == pytest.approx([predictor.decode_s(batch, context + number) for number in range(steps)], rel=1e-9)
