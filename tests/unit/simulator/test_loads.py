"""Synthetic loads: the rates, lengths and shared beginnings that were asked for, in order of time."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.loads import (
    Constant,
    DailyCycle,
    Even,
    Fixed,
    Gamma,
    Gaps,
    Lognormal,
    Poisson,
    Prefixes,
    Steps,
    Switching,
    Synthetic,
    merged,
)

TOKENS = Fixed(320), Fixed(10)


@pytest.mark.parametrize(
    ("gaps", "least", "most"),
    [(Even(), 0.0, 0.01), (Poisson(), 0.95, 1.05), (Gamma(3.0), 2.6, 3.4), (Switching(), 1.15, 1.4)],
)
def test_gaps_are_one_on_average_and_vary_as_asked(gaps: Gaps, least: float, most: float) -> None:
    drawn = list(islice(gaps.draw(Random(1)), 60_000))
    mean = sum(drawn) / len(drawn)
    variation = math.sqrt(sum((gap - mean) ** 2 for gap in drawn) / len(drawn)) / mean
    assert mean == pytest.approx(1.0, rel=0.06)
    assert least <= variation <= most


def test_a_day_has_its_peak_five_times_its_trough() -> None:
    load = Synthetic(DailyCycle(peak_per_s=10.0, period_s=4000.0), *TOKENS, duration_s=4000.0)
    times_s = [arrival.at_s for arrival in load]
    trough = sum(at_s < 200 or at_s >= 3800 for at_s in times_s)
    peak = sum(1800 <= at_s < 2200 for at_s in times_s)
    assert peak / trough == pytest.approx(5.0, rel=0.2)
    assert len(times_s) == pytest.approx(6.0 * 4000, rel=0.03)


def test_steps_change_the_rate_when_they_say() -> None:
    load = Synthetic(Steps([(10.0, 5.0), (20.0, 50.0)]), *TOKENS, duration_s=30.0)
    times_s = [arrival.at_s for arrival in load]
    assert min(times_s) >= 10.0
    assert sum(at_s < 20 for at_s in times_s) == pytest.approx(50, abs=25)
    assert sum(at_s >= 20 for at_s in times_s) == pytest.approx(500, rel=0.2)


@given(st.integers(0, 1000), st.sampled_from([Poisson(), Gamma(4.0), Switching()]))
def test_a_load_is_the_same_each_time_and_in_order(seed: int, gaps: Gaps) -> None:
    load = Synthetic(Constant(5.0), Lognormal(200), Lognormal(50), gaps=gaps, requests=50, seed=seed)
    first = list(load)
    assert first == list(load)
    assert len(first) == 50
    assert all(one.at_s <= other.at_s for one, other in pairwise(first))
    assert first != list(Synthetic(Constant(5.0), Lognormal(200), Lognormal(50), gaps=gaps, requests=50, seed=seed + 1))


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    random = Random(2)
    drawn = [Lognormal(1155, 1.0).draw(random) for _ in range(40_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(1155, rel=0.03)
    assert {Lognormal(100, 2.0, least=90, most=110).draw(random) for _ in range(500)} <= set(range(90, 111))


def test_prompts_share_their_beginnings_and_nothing_else() -> None:
    load = Synthetic(Constant(5.0), *TOKENS, prefixes=Prefixes(count=3, tokens=160), requests=300)
    arrivals = list(load)
    beginnings = {one.keys[:10] for one in arrivals}
    ends = [key for one in arrivals for key in one.keys[10:]]
    assert len(beginnings) == 3
    assert len(set(ends)) == len(ends) == 300 * 10
    popular = max(beginnings, key=lambda keys: sum(one.keys[:10] == keys for one in arrivals))
    assert sum(one.keys[:10] == popular for one in arrivals) > 120


def test_loads_are_merged_in_order_of_time() -> None:
    a = Synthetic(Constant(5.0), *TOKENS, requests=50, name="a")
    b = Synthetic(Constant(2.0), *TOKENS, requests=50, name="b", service_class="batch")
    both = list(merged(a, b))
    assert len({one.request_id for one in both}) == 100
    assert all(one.at_s <= other.at_s for one, other in pairwise(both))
