"""Virtual time: in order, and never back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.event_loop import EventLoop


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_events_come_by_time_and_then_as_they_were_asked_for(times: list[float]) -> None:
    loop, seen = EventLoop(), []
    for number, at_s in enumerate(times):
        loop.at(at_s, lambda number=number: seen.append((loop.now_s, number)))
    assert loop.run() == len(times)
    assert seen == sorted((at_s, number) for number, at_s in enumerate(times))


def test_what_should_have_happened_already_happens_now() -> None:
    loop, seen = EventLoop(), []
    loop.at(5.0, lambda: loop.at(1.0, lambda: seen.append(loop.now_s)))
    loop.run()
    assert seen == [5.0]


def test_a_run_can_stop_at_a_time_and_go_on() -> None:
    loop = EventLoop()
    seen: list[float] = []
    for at_s in (1.0, 2.0, 3.0):
        loop.at(at_s, seen.append, at_s)
    assert loop.run(until_s=2.0) == 2
    assert seen == [1.0, 2.0]
    loop.run()
    assert seen == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("at_s", [math.inf, math.nan])
def test_an_event_that_would_never_come_is_refused(at_s: float) -> None:
    with pytest.raises(ValueError, match="never"):
        EventLoop().at(at_s, print)
