"""Overload in virtual time with the live admission: what `benchmarks.overload` promises.

The limits are looser than the promises: a cluster of half the size, and the first minutes of a load.
"""

from __future__ import annotations

import pytest

from benchmarks.goodput import ANSWERED, REFUSED, Result, Try, honesty, result
from benchmarks.offered_load import SLOS, draw
from benchmarks.overload_simulated import World, replay

CAPACITY_PER_S = 9.0
"""Of four prefill and four decode workers with every request realtime: a bit less than the ramp finds."""

WORLD = World(prefill=4, decode=4, seconds=140.0, warm_s=60.0)


@pytest.fixture(scope="module")
def loads() -> dict[float, Result]:
    return {times: replay(WORLD, times * CAPACITY_PER_S, times) for times in (1.0, 3.0)}


def test_goodput_at_three_times_the_capacity_stays_above_nine_tenths_of_what_it_is_at_capacity(
    loads: dict[float, Result],
) -> None:
    assert loads[3.0].goodput_per_s > 0.9 * loads[1.0].goodput_per_s
    assert loads[3.0].unanswered == 0


def test_realtime_requests_keep_their_slo_and_the_rest_is_refused(loads: dict[float, Result]) -> None:
    realtime, nearline, batch = loads[3.0].classes
    assert realtime.attainment > 0.98
    assert realtime.refused < 0.01 * realtime.tries
    assert nearline.refused > 0
    assert batch.refused > 0
    assert loads[3.0].refusals.keys() == {"long_wait"}
    assert loads[1.0].refusals == {}


def test_who_comes_back_when_it_is_told_to_is_let_in(loads: dict[float, Result]) -> None:
    honest = loads[3.0].honesty
    assert honest is not None
    assert honest.came_back > 100
    assert honest.within_one_more > 0.8
    assert 0.9 < honest.real_over_told < 1.2


def test_the_same_load_for_the_same_seed() -> None:
    first, second = list(draw(5.0, 60.0, 7, WORLD.lengths)), list(draw(5.0, 60.0, 7, WORLD.lengths))
    assert first == second
    assert {one.service_class for one in first} == set(SLOS)
    assert list(draw(5.0, 60.0, 8, WORLD.lengths)) != first


def tried(number: int, sent_s: float, outcome: str, *, ttft_s: float = 0.1, told_s: float = 0.0) -> Try:
    ended_s = sent_s + (0.0 if outcome == REFUSED else 1.0)
    return Try("r", number, "realtime", "a", sent_s, ended_s, outcome, ttft_s=ttft_s, retry_after_s=told_s)


def test_goodput_counts_what_ended_in_time_within_its_slo() -> None:
    tries = [
        tried(0, 10.0, ANSWERED),
        tried(0, 11.0, ANSWERED, ttft_s=SLOS["realtime"].ttft_s + 1),
        tried(0, 19.5, ANSWERED),  # ends when the span is over
        tried(0, 8.5, ANSWERED),  # began before it
        tried(0, 12.0, REFUSED, told_s=3.0),
    ]
    one = result(tries, 1.0, 1.0, begin_s=9.0, end_s=19.9)
    assert one.goodput_per_s == pytest.approx(2 / 10.9)
    assert one.classes[0].attainment == 2 / 4


def test_honesty_follows_each_client() -> None:
    assert honesty([tried(0, 1.0, REFUSED, told_s=3.0)]) is None
    chain = [tried(0, 1.0, REFUSED, told_s=3.0), tried(1, 4.0, REFUSED, told_s=3.0), tried(2, 7.0, ANSWERED)]
    found = honesty(chain)
    assert found is not None
    assert (found.came_back, found.at_once, found.within_one_more) == (1, 0.0, 1.0)
    assert found.real_over_told == pytest.approx(2.0)
