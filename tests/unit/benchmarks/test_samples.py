"""Percentiles, and which inter-token latencies count as disturbed."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.samples import Window, percentile, split_gaps, spread

DURATIONS = st.lists(st.floats(0, 1e4), min_size=2, max_size=50)


@given(samples=DURATIONS, percent=st.integers(1, 99))
def test_a_percentile_is_the_one_of_the_standard_library(samples: list[float], percent: int) -> None:
    expected = statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]

    assert percentile(samples, percent) == pytest.approx(expected, abs=1e-6)


def test_the_ends_are_the_least_and_the_largest_sample() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 100)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_or_outside_0_to_100_is_refused(samples: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(samples, percent)


def test_a_spread_is_in_milliseconds() -> None:
    found = spread([0.001, 0.003])

    assert found is not None
    assert (found.samples, found.mean_ms, found.p50_ms, found.max_ms) == (2, 2.0, 2.0, 3.0)


def test_there_is_no_spread_of_no_samples() -> None:
    assert spread([]) is None


def test_a_gap_that_touches_a_window_at_either_end_is_disturbed() -> None:
    arrivals_s = [0.0, 1.0, 2.5, 3.0, 4.5, 5.0]

    inside, outside = split_gaps(arrivals_s, [Window(2.0, 4.0)], since_s=0.0)

    assert inside == [1.5, 0.5, 1.5]
    assert outside == [1.0, 0.5]


def test_a_stall_that_ends_after_the_window_is_counted_whole() -> None:
    inside, _ = split_gaps([1.0, 9.0], [Window(2.0, 8.9)], since_s=0.0)

    assert inside == [8.0]


def test_gaps_before_all_streams_were_decoding_are_not_counted_as_quiet() -> None:
    inside, outside = split_gaps([0.0, 1.0, 2.0, 3.0], [], since_s=1.0)

    assert (inside, outside) == ([], [1.0, 1.0])


@given(
    gaps_s=st.lists(st.floats(0.001, 1), min_size=1, max_size=30),
    start_s=st.floats(0, 10),
    length_s=st.floats(0, 10),
)
def test_every_gap_is_counted_once(gaps_s: list[float], start_s: float, length_s: float) -> None:
    arrivals_s = [sum(gaps_s[:count]) for count in range(len(gaps_s) + 1)]

    inside, outside = split_gaps(arrivals_s, [Window(start_s, start_s + length_s)], since_s=0.0)

    assert len(inside) + len(outside) == len(gaps_s)
    assert sum(inside) + sum(outside) == pytest.approx(sum(gaps_s))
