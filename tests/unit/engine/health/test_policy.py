"""From findings over time to healthy, suspect or sick."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.health.findings import FOR_GOOD, SICK, SUSPECT, Finding, Growth
from engine.health.policy import HealthPolicy
from slipstream.v1.registry_pb2 import HealthState

HEALTHY = HealthState.HEALTHY
HOT = Finding("throttled", SUSPECT, "hot", hold_s=30.0)
LOST = Finding("gpu_lost", SICK, "lost", keep_s=FOR_GOOD)
NOW = Finding("now", SICK, "now")


def test_what_is_found_at_once_counts_at_once_and_its_reason_is_told() -> None:
    verdict = HealthPolicy(60.0).judge([NOW], 10.0)
    assert (verdict.state, verdict.reasons, verdict.since_s) == (SICK, (NOW,), 10.0)


def test_what_has_to_last_counts_once_it_has() -> None:
    policy = HealthPolicy(60.0)
    states = [policy.judge([HOT], at_s).state for at_s in (0.0, 10.0, 29.0, 30.0)]
    assert states == [HEALTHY, HEALTHY, HEALTHY, SUSPECT]


def test_a_break_begins_the_time_anew() -> None:
    policy = HealthPolicy(60.0)
    for at_s, found in ((0.0, [HOT]), (20.0, []), (25.0, [HOT]), (50.0, [HOT])):
        assert policy.judge(found, at_s).state == HEALTHY
    assert policy.judge([HOT], 55.0).state == SUSPECT


def test_it_stays_for_a_while_after_it_was_seen_last() -> None:
    policy = HealthPolicy(60.0)
    policy.judge([NOW], 0.0)
    assert [policy.judge([], at_s).state for at_s in (1.0, 59.0, 60.0)] == [SICK, SICK, HEALTHY]


def test_some_things_stay_for_good() -> None:
    policy = HealthPolicy(60.0)
    policy.judge([LOST], 0.0)
    assert policy.judge([], 1e9).state == SICK


def test_two_devices_do_not_hide_each_other() -> None:
    first, second = (Finding("hot", SUSPECT, f"GPU {number}", str(number)) for number in range(2))
    policy = HealthPolicy(60.0)
    policy.judge([first], 0.0)
    assert policy.judge([second], 30.0).reasons == (first, second)
    assert policy.judge([second], 65.0).reasons == (second,)


FINDINGS = st.builds(
    Finding,
    code=st.sampled_from("abc"),
    state=st.sampled_from([SUSPECT, SICK]),
    text=st.just(""),
    hold_s=st.sampled_from([0.0, 5.0, 30.0]),
    keep_s=st.sampled_from([None, None, 0.0, FOR_GOOD]),
)
STEPS = st.lists(st.tuples(st.floats(0.1, 20.0), st.lists(FINDINGS, max_size=3)), max_size=40)


@given(STEPS)
def test_the_state_is_that_of_the_gravest_reason_and_reasons_were_found(
    steps: list[tuple[float, list[Finding]]],
) -> None:
    policy, now_s, known = HealthPolicy(10.0), 0.0, set[Finding]()
    since_s, state = 0.0, None
    for pause_s, found in steps:
        now_s += pause_s
        known |= set(found)
        verdict = policy.judge(found, now_s)
        assert verdict.state == max((one.state for one in verdict.reasons), default=HEALTHY)
        assert set(verdict.reasons) <= known
        if verdict.state != state:
            state, since_s = verdict.state, now_s
        assert verdict.since_s == since_s


@given(STEPS)
def test_nothing_for_long_is_health_unless_it_was_for_good(steps: list[tuple[float, list[Finding]]]) -> None:
    policy, now_s = HealthPolicy(10.0), 0.0
    for pause_s, found in steps:
        now_s += pause_s
        policy.judge(found, now_s)
    lasting = policy.judge([], now_s + 1e6).reasons
    assert all(one.keep_s == FOR_GOOD for one in lasting)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_what_flickers_changes_the_state_at_most_once_in_the_time_to_clear(flickers: list[bool]) -> None:
    """However a finding comes and goes, between sick and healthy lies at least `clear_s`."""
    policy, changes, before = HealthPolicy(10.0), list[float](), HEALTHY
    for second, there in enumerate(flickers):
        state = policy.judge([NOW] if there else [], float(second)).state
        if state != before and state == HEALTHY:
            assert not any(flickers[max(0, second - 9) : second + 1])
            changes.append(float(second))
        before = state
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(changes))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=50))
def test_growth_is_never_negative_and_never_more_than_the_counter(values: list[int]) -> None:
    growth = Growth(window_s=10.0)
    for second, value in enumerate(values):
        assert 0 <= growth.add(value, float(second)) <= value


def test_growth_is_of_the_window_and_a_reset_begins_anew() -> None:
    growth = Growth(window_s=10.0)
    assert [growth.add(value, at_s) for at_s, value in ((0.0, 100), (5.0, 104), (10.0, 110), (20.0, 111))] == [
        0,
        4,
        10,
        1,
    ]
    assert growth.add(3, 21.0) == 0
    assert growth.add(None, 22.0) == 0
