"""Latencies in buckets: what adding, merging and reading them back promise."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.latency_counts import LAST_BUCKET, LEAST_S, MOST_S, LatencyCounts, bucket_of, middle_s

latencies = st.lists(st.floats(LEAST_S, MOST_S), min_size=1, max_size=200)


@given(latencies, st.sampled_from([1.0, 50.0, 90.0, 99.0, 100.0]))
def test_a_percentile_is_exact_to_five_percent(values: list[float], percent: float) -> None:
    counts = LatencyCounts()
    for value in values:
        counts.add(value)
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    assert abs(counts.percentile_s(percent) / exact - 1) <= 0.051


@given(latencies, latencies)
def test_merging_is_adding_all_of_them(some: list[float], others: list[float]) -> None:
    merged, other, whole = LatencyCounts(), LatencyCounts(), LatencyCounts()
    for value in some:
        merged.add(value)
        whole.add(value)
    for value in others:
        other.add(value)
        whole.add(value)
    merged.merge(other)
    assert merged.pairs() == whole.pairs()
    assert np.isclose(merged.mean_s, whole.mean_s)


@given(latencies)
def test_pairs_carry_all_that_a_percentile_needs(values: list[float]) -> None:
    counts = LatencyCounts()
    for value in values:
        counts.add(value, times=2)
    again = LatencyCounts(dict(counts.pairs()), counts.total_s)
    assert len(again) == 2 * len(values)
    assert again.percentile_s(90) == counts.percentile_s(90)
    assert again.mean_s == counts.mean_s


def test_what_lies_beyond_the_buckets_is_in_the_outermost() -> None:
    assert bucket_of(0.0) == bucket_of(-1.0) == 0
    assert bucket_of(1e9) == LAST_BUCKET
    assert middle_s(LAST_BUCKET) <= MOST_S


def test_nothing_is_fast_and_within_every_limit() -> None:
    nothing = LatencyCounts()
    assert (len(nothing), nothing.mean_s, nothing.percentile_s(99), nothing.share_within(0.0)) == (0, 0.0, 0.0, 1.0)


def test_the_share_within_a_limit_counts_those_that_took_no_longer() -> None:
    counts = LatencyCounts()
    counts.add(0.01, times=3)
    counts.add(1.0)
    assert counts.share_within(0.1) == 0.75
