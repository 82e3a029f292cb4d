"""When refused clients are told to come back, and that they are let in then."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.admission.appointments import GRACE_S, LINE_SHARE, LONGEST_WAIT_S, MAX_PLACES, Appointments
from tests.support.admission_loop import Job, job


def given_to(appointments: Appointments, jobs: list[Job], now_s: float = 0.0, took_s: float = 1.0) -> list[float]:
    return [now_s + appointments.give(one, 1.0, took_s, now_s) for one in jobs]


def test_times_are_one_after_the_other() -> None:
    times = given_to(Appointments(), [job(0.0) for _ in range(30)])
    steps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 1.0
    assert all(0 < step <= 1.0 / LINE_SHARE for step in steps)


def test_each_tenant_and_class_has_a_line_of_its_own() -> None:
    appointments = Appointments()
    given_to(appointments, [job(0.0, "crowd") for _ in range(50)])
    assert given_to(appointments, [job(0.0, "calm")]) == [1.0]


def test_a_client_is_due_at_its_time_and_not_long_before_or_after() -> None:
    appointments, client = Appointments(), job(0.0)
    wait_s = appointments.give(client, 10.0, 1.0, 0.0)
    assert wait_s == 10.0
    assert not appointments.is_due(client, 5.0)
    assert not appointments.is_due(job(0.0), wait_s), "it is somebody else"
    assert appointments.is_due(client, wait_s)
    assert appointments.is_due(client, wait_s + GRACE_S - 0.1)
    assert not appointments.is_due(client, wait_s + GRACE_S + 0.1)


def test_who_comes_before_its_time_is_told_the_same_time_again() -> None:
    appointments, client = Appointments(), job(0.0)
    appointments.give(client, 10.0, 1.0, 0.0)
    assert given_to(appointments, [client] * 5, now_s=4.0) == [10.0] * 5


def test_an_appointment_is_for_as_many_requests_as_were_refused_up_to_a_limit() -> None:
    appointments, client = Appointments(), job(0.0)
    for _ in range(3 * MAX_PLACES):
        appointments.give(client, 10.0, 1.0, 0.0)
    let_in = 0
    while appointments.is_due(client, 10.0):
        appointments.kept(client, 10.0)
        let_in += 1
    assert let_in == MAX_PLACES


@pytest.mark.parametrize("come_back", [True, False])
def test_the_line_is_as_long_as_those_who_come_back_make_it(come_back: bool) -> None:
    appointments, now_s = Appointments(), 0.0
    told: list[tuple[float, Job]] = []
    clients, waits = [job(0.0) for _ in range(4000)], []
    for client in clients:
        now_s += 0.5  # twice as many are refused as can be let in
        while come_back and told and told[0][0] <= now_s:
            appointments.kept(told.pop(0)[1], now_s)
        waits.append(appointments.give(client, 1.0, 1.0, now_s))
        if waits[-1] <= LONGEST_WAIT_S:
            told.append((now_s + waits[-1], client))
    if come_back:
        # It is about as long as anybody waits: who is told more leaves, and is not counted on.
        assert 0.8 * LONGEST_WAIT_S < median(waits[1000:]) < 3 * LONGEST_WAIT_S
    else:
        assert median(waits[1000:]) < 0.5 * LONGEST_WAIT_S


def test_when_nobody_waits_any_more_the_line_is_forgotten() -> None:
    appointments = Appointments()
    given_to(appointments, [job(0.0) for _ in range(50)])
    appointments.no_queue(job(0.0).claim)
    assert given_to(appointments, [job(0.0)]) == [1.0]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 100), st.booleans()), max_size=60))
def test_nothing_is_remembered_for_longer_than_it_counts(
    refusals: list[tuple[float, float, bool]],
) -> None:
    appointments, now_s, last_s = Appointments(), 0.0, 0.0
    for passed_s, earliest_s, again in refusals:
        now_s += passed_s
        client = job(now_s)
        for _ in range(1 + again):
            last_s = max(last_s, now_s + appointments.give(client, earliest_s, 0.3, now_s))
    appointments.is_due(job(now_s), last_s + GRACE_S + 0.1)
    assert len(appointments) == 0
